"""Real video files for tests, written by PyAV."""
import av
import torch


def write_video(path, frames, fps=8, codec="libx264", container=None, pix_fmt="yuv420p", **options):
    """Write frames uint8 (n,H,W,3) to path (container by suffix or by name). options: of the codec, e.g. g="12"."""
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=fps)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.options = pix_fmt, {k: str(v) for k, v in options.items()}
        if codec == "libx264":
            stream.codec_context.thread_type = "FRAME"  # or every frame is cut into two slices
        for x in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(torch.as_tensor(x).numpy(), format="rgb24")))
        file.mux(stream.encode())


def numbered(n, size=64):
    """n frames that tell their number through any codec: 8 bits as light and dark columns. -> uint8 (n,size,size,3)."""
    bits = torch.tensor([[(i >> b) & 1 for b in range(8)] for i in range(n)], dtype=torch.uint8) * 200 + 20  # (n,8)
    return bits.repeat_interleave(size // 8, 1)[:, None, :, None].expand(n, size, size, 3).contiguous()


def numbers(frames):
    """What `numbered` wrote: uint8 (T,3,H,W) -> list of frame numbers."""
    T, _, H, W = frames.shape
    columns = frames.float().mean((1, 2)).view(T, 8, W // 8).mean(-1) > 120  # (T,8)
    return (columns.long() * 2 ** torch.arange(8)).sum(-1).tolist()
