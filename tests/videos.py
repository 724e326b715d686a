"""Real video files for tests, written by PyAV."""
import av
import torch


def write_video(path, frames, fps=8, codec="libx264", container=None, pix_fmt="yuv420p", setup=None,
                movflags="", times=None, late=None, source="rgb24", **options):
    """Write frames uint8 (n,H,W,3) to path, in a container by its suffix or by name.

    setup: what else to set of the stream. movflags: of mp4. times: when each frame is shown, in
    frames. late: seconds of sound before the first one. source: what the frames' values are, as
    FFmpeg calls it. options: of the codec, such as g="12".
    """
    layout = dict(movflags=movflags) if movflags else {}
    with av.open(str(path), "w", format=container, options=layout) as file:
        stream = file.add_stream(codec, rate=fps)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.options = pix_fmt, {k: str(v) for k, v in options.items()}
        if codec == "libx264":
            stream.codec_context.thread_type = "FRAME"  # or every frame is cut into two slices
        if setup:
            setup(stream)
        packets = []
        if late:
            sound = file.add_stream("aac", rate=16000)
            for k in range(int((late + len(frames) / fps) * 16000 / 1024)):
                silence = av.AudioFrame(format="fltp", layout="mono", samples=1024)
                silence.sample_rate, silence.pts = 16000, 1024 * k
                silence.planes[0].update(bytes(4096))
                packets += sound.encode(silence)
            packets += sound.encode()
        for k, x in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(torch.as_tensor(x).numpy(), format=source)
            frame.pts = (times[k] if times else k) + int((late or 0) * fps)
            packets += stream.encode(frame)
        packets += stream.encode()
        if late:
            packets.sort(key=lambda packet: packet.dts * packet.time_base)
        for packet in packets:
            file.mux(packet)


def copy_videos(path, sources, together=False, covers=(), later=0):
    """Copy the streams of video files into one: one after another, or together as streams.

    covers: names of sources that are only pictures. later: seconds to add to all time stamps.
    """
    streams = []
    with av.open(str(path), "w") as out:
        for source in sources:
            with av.open(str(source)) as file:
                if together or not streams:
                    streams.append(out.add_stream_from_template(file.streams.video[0]))
                stream = streams[-1]
                if source in covers:
                    stream.disposition = av.stream.Disposition.attached_pic
        for k, source in enumerate(sources):
            with av.open(str(source)) as file:
                first = file.streams.video[0]
                begin = round(later / first.time_base)
                for packet in file.demux(first):
                    if packet.dts is not None:
                        packet.pts += begin
                        packet.dts += begin
                        packet.stream = streams[k] if together else streams[0]
                        out.mux(packet)
                if not together:
                    later += first.frames / float(first.average_rate)


def numbered(n, size=64):
    """n frames that show their number through any codec, as 8 light or dark columns.

    -> uint8 (n,size,size,3).
    """
    bits = [[(i >> b) & 1 for b in range(8)] for i in range(n)]
    columns = torch.tensor(bits, dtype=torch.uint8) * 200 + 20  # (n,8)
    line = columns.repeat_interleave(size // 8, 1)
    return line[:, None, :, None].expand(n, size, size, 3).contiguous()


def numbers(frames):
    """What `numbered` wrote: uint8 (T,3,H,W) -> list of frame numbers."""
    T, _, H, W = frames.shape
    columns = frames.float().mean((1, 2)).view(T, 8, W // 8).mean(-1) > 120  # (T,8)
    return (columns.long() * 2 ** torch.arange(8)).sum(-1).tolist()
