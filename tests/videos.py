"""Real video files for tests, written by PyAV."""
import av
import torch


def write_video(path, frames, fps=8, codec="libx264", container=None, pix_fmt="yuv420p", setup=None,
                movflags="", **options):
    """Write frames uint8 (n,H,W,3) to path, in a container by its suffix or by name.

    setup: what else to set of the stream. movflags: of mp4. options: of the codec, such as g="12".
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
        for x in frames:
            pixels = torch.as_tensor(x).numpy()
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())


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


def write_with_sound(path, frames, late, fps=8):
    """Write frames uint8 (n,H,W,3) that begin `late` seconds after the sound does."""
    frames = [av.VideoFrame.from_ndarray(x.numpy(), format="rgb24") for x in frames]
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=fps)
        stream.height, stream.width = frames[0].height, frames[0].width
        stream.pix_fmt, stream.options = "yuv420p", dict(bf="2", g="12")
        stream.codec_context.thread_type = "FRAME"
        sound = file.add_stream("aac", rate=16000)
        packets = []
        for k in range(int((late + len(frames) / fps) * 16000 / 1024)):
            silence = av.AudioFrame(format="fltp", layout="mono", samples=1024)
            silence.sample_rate, silence.pts = 16000, 1024 * k
            silence.planes[0].update(bytes(4096))
            packets += sound.encode(silence)
        for k, frame in enumerate(frames):
            frame.pts = k + late * fps
            packets += stream.encode(frame)
        packets += sound.encode()
        packets += stream.encode()
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            file.mux(packet)
