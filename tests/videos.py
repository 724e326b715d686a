"""Real video files for tests, written by PyAV."""
import av
import torch


def write_video(path, frames, fps=8, codec="libx264", container=None, pix_fmt="yuv420p", **options):
    """Write frames uint8 (n,H,W,3) to path, in a container by its suffix or by name.

    options: of the codec, such as g="12".
    """
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=fps)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.options = pix_fmt, {k: str(v) for k, v in options.items()}
        if codec == "libx264":
            stream.codec_context.thread_type = "FRAME"  # or every frame is cut into two slices
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
