"""What search remembers of files: which there are, copies, what is away, what can't be read."""
import os
import shutil

import pytest
import torch
from conftest import noise_video, small_clip, small_model

import search
from lib import index as store
from lib.index import File
from lib.weights import load_checkpoint, save_checkpoint
from tmass import TMASS


@pytest.fixture
def videos(tmp_path):
    """A folder of four videos."""
    for k in range(4):
        noise_video(tmp_path / f"{k}.mp4", k)
    return tmp_path


@pytest.fixture
def found(ask):
    """found(DIR) -> (what is said, the names of what is found, sorted)"""
    def found(*words, **options):
        out, err = ask("noise", "--top", 99, "--videos", *words, **options)
        return err, sorted(line.split()[3] for line in out.splitlines()[3:])
    return found


def shards(folder):
    return sorted((folder / search.INDEX).glob("*.shard"))


# ---- which files ----

def test_only_what_is_new_is_encoded(videos, found, ckpt):
    """New, changed and missing files; other weights and windows have their own embeddings."""
    assert "encoded 4 videos, 4 in the index, 4 pieces\n" in found(videos)[0]
    [first] = shards(videos)
    body = first.read_bytes()
    noise_video(videos / "4.mp4", 4)
    noise_video(videos / "1.mp4", 11)
    os.utime(videos / "1.mp4", ns=(1, 1))
    (videos / "2.mp4").rename(videos / "2.txt")
    said, names = found(videos, "-n")
    assert "4 in the index, 4 pieces (-n: some may be gone)\n" in said
    assert names == ["0.mp4", "1.mp4", "3.mp4"]  # what is gone is not shown
    said, names = found(videos)
    assert "encoded 2 videos, 4 in the index" in said and "2.mp4" not in names
    (videos / "2.txt").rename(videos / "2.mp4")
    assert "encoded 0 videos, 5 in the index" in found(videos)[0]  # its rows were still there
    assert first.read_bytes() == body  # never rewritten
    other = videos / "other.pt"
    model, tokenizer, _ = load_checkpoint(ckpt)
    with torch.no_grad():
        model.clip.visual.proj[3, 5] += 0.1
    save_checkpoint(other, model, tokenizer, {})
    for options, weights, n in ((["--window", .25], ckpt, 5), ([], other, 5), ([], ckpt, 0)):
        for encoded in (n, 0):
            assert f"encoded {encoded} videos, 5" in found(videos, *options, ckpt=weights)[0]
    for name in os.listdir(videos):
        if name.endswith(".mp4"):
            os.unlink(videos / name)
    with pytest.raises(AssertionError, match="are gone"):
        found(videos, "-n")


def test_renamed_and_copied_files_are_encoded_once(videos, found):
    """Those of the same size, time and content; a changed one is encoded anew, always."""
    tape = (videos / "3.mp4").read_bytes()
    size = 2 * store.MEGABYTE
    (videos / "3.mp4").write_bytes(tape + bytes(2 * size))  # two megabytes in its middle unread
    found(videos)
    (videos / "below").mkdir()
    (videos / "0.mp4").rename(videos / "below" / "renamed.mp4")
    shutil.copy2(videos / "1.mp4", videos / "copy.mp4")
    said, names = found(videos)
    assert "encoded 0 videos, 5 in the index, 5 pieces\n" in said
    assert names == ["1.mp4", "2.mp4", "3.mp4", "below/renamed.mp4", "copy.mp4"]
    with open(videos / "3.mp4", "rb+") as file:  # a download is completed in its place
        file.seek(len(tape) + size)
        file.write(b"more")
    assert "encoded 1 video, 5 in the index" in found(videos)[0]
    shutil.copy(videos / "3.mp4", videos / "another tape.mp4")  # equal, but for its time
    assert "encoded 1 video, 6 in the index" in found(videos)[0]
    body = bytearray((videos / "2.mp4").read_bytes())
    body[body.index(b"mdat") + 40] ^= 1
    (videos / "new.mp4").write_bytes(body)
    shutil.copystat(videos / "2.mp4", videos / "new.mp4")
    assert "encoded 1 video, 7 in the index" in found(videos)[0]  # equal in size and time alone


def test_linked_and_system_folders(tmp_path):
    """Links are followed, each folder once; what systems keep beside the videos is passed over."""
    inside = tmp_path / "inside"
    for name in ("inside/real", "outside/below", "inside/@eaDir", "inside/real/#recycle",
                 "inside/$Recycle.Bin", "inside/.hidden", "inside/lost+found"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.MP4").write_text("x")
    (inside / "b.mp4").write_text("x")
    (inside / "notes.txt").write_text("x")
    for name, target in (("loop", "."), ("out", "../outside"), ("out again", "../outside"),
                         ("nowhere", "../missing"), ("e.mp4", "b.mp4"), ("f.mp4", "missing.mp4")):
        (inside / name).symlink_to(target)
    (tmp_path / "outside" / "back").symlink_to(inside)
    [listed] = store.list_videos([inside])
    assert list(listed.stamps) == ["b.mp4", "e.mp4", "out/below/a.MP4", "real/a.MP4"]
    assert listed.reasons == []


def test_several_folders_and_files(videos, ask):
    (videos / "w").mkdir()
    (videos / "3.mp4").rename(videos / "w" / "3.mp4")
    (videos / "link").symlink_to("w")
    everything = [str(videos / name) for name in ("0.mp4", "1.mp4", "2.mp4", "w/3.mp4")]

    def files(*paths):
        return sorted(ask("-f", "x", "--videos", *paths)[0].splitlines())

    assert files(videos) == everything
    assert files(videos, videos / "w", videos / "link", everything[0]) == everything
    assert files(everything[1], "--videos", videos / "w") == everything[1::2]
    with pytest.raises(TypeError, match="list of folders and files"):
        search.build_index(small_model(), str(videos))


# ---- what can't be read ----

def test_a_bad_file_is_named_once(videos, found, ask):
    """What is wrong with its content is remembered until it changes; an update says what is new."""
    (videos / "bad.mp4").write_text("nothing")
    said = found(videos)[0]
    assert "encoded 4 videos, 4 in the index, 4 pieces; left out:\n" in said
    assert said.count("bad.mp4: can't be decoded") == 1
    search.named.clear()  # as another process would begin
    assert "bad.mp4" not in found(videos)[0]
    assert ask("--update", "--videos", videos) == ("", "")
    noise_video(videos / "bad.mp4", 9)
    assert "encoded 1 video, 5 in" in ask("--update", "--videos", videos)[1]


def test_what_the_system_refused_is_tried_again(videos, found, monkeypatch):
    """A file that can't be read, a folder that can't be listed, one that goes away meanwhile."""
    (videos / "refused.mp4").symlink_to("/proc/self/mem")  # a regular file; reading it fails
    monkeypatch.chdir(videos)
    for _ in range(17):  # a path that is too long, also for the superuser
        os.mkdir("x" * 250)
        os.chdir("x" * 250)
    listing = store.list_videos

    def list_and_lose(*arguments):
        folders = listing(*arguments)
        (videos / "0.mp4").rename(videos / "away")
        return folders

    monkeypatch.setattr(search, "list_videos", list_and_lose)
    index = search.build_index(small_model(), [videos])
    assert index.names == ["1.mp4", "2.mp4", "3.mp4"]
    content = torch.load(shards(videos)[0], weights_only=True)
    assert [x[0] for x in content["files"]] == index.names
    monkeypatch.undo()
    (videos / "away").rename(videos / "0.mp4")
    search.named.clear()
    said, names = found(videos)
    assert names == ["0.mp4", "1.mp4", "2.mp4", "3.mp4"]
    assert "refused.mp4" in said and "x: File name too long" in said


def test_where_the_index_goes(videos, found, ask):
    (videos / search.INDEX).write_text("nothing can be written here")
    said, names = found(videos)
    assert "cannot write" in said and "use --index DIR" in said and len(names) == 4
    err = ask("--update", "--videos", videos, expect=2)[1].splitlines()[-1]
    assert err.startswith("error: cannot write") and "without saving" not in err
    for encoded in (4, 0):
        said, names = found(videos, "--index", videos / "index" / "of all")
        assert f"encoded {encoded} videos" in said and len(names) == 4
    odd = videos / os.fsdecode(b"caf\xe9 \x1b[31m")  # torch opens no such names
    odd.mkdir()
    (videos / "0.mp4").rename(odd / "0.mp4")
    for encoded in ("1 video", "0 videos"):
        assert f"encoded {encoded}, 1 in" in found(odd)[0]


# ---- shards ----

FILE = File("0.mp4", (1, 2), None, "abc")


@pytest.mark.parametrize("change", [
    *(dict(files=[file]) for file in (
        (5, (1, 2), None),
        ("0.mp4", 7, None),
        ("0.mp4", ("1", 2), None),
        ("0.mp4", (1, 2), 5),
        ("0.mp4", (1, 2), None, 5),
        ("/etc/x", (1, 2), None),  # the page would let it out
        ("b/../../a.mp4", (1, 2), None),
    )),
    dict(files=None),
    dict(mean=torch.zeros(1, 16).half().to_sparse()),
    dict(times=torch.full((1, 4), torch.nan)),
    dict(spans=torch.full((1, 2), torch.inf)),
    dict(file=torch.tensor([1], dtype=torch.int32)),
    dict(file=torch.tensor([0])),
    dict(frames=[1]),
    dict(frames=torch.zeros(1, 2, 16).half(), times=torch.zeros(1, 2)),  # another T
])
def test_shards_of_other_types_and_sizes_are_damaged(tmp_path, change):
    times = torch.arange(4.)[None]
    shard = store.file_shard(torch.randn(1, 4, 16), times, times[:, :2], FILE)
    store.write_shard(tmp_path, "x.shard", shard)
    path = tmp_path / "x.shard"
    content = torch.load(path, weights_only=True)
    assert store.read_shard(path, (4, 16)).files == [FILE]
    torch.save(dict(content, files=[("..b..mp4", (1, 2), None)]), path)  # of an earlier version
    assert store.read_shard(path, (4, 16)).files == [File("..b..mp4", (1, 2), None)]
    torch.save(content | change, path)
    with pytest.raises(OSError, match="damaged"):
        store.read_shard(path, (4, 16))


def test_damaged_shards_are_left_out(videos, found):
    before = found(videos)[1]
    for damage in (lambda x: x[:3000], lambda x: b"", lambda x: bytes(len(x)),
                   lambda x: x[:-700] + bytes(700)):
        [path] = shards(videos)
        path.write_bytes(damage(path.read_bytes()))
        said, names = found(videos)
        assert names == before and said.count("is left out (") == 1
        assert "encoded 4 videos, 4 in the index" in said
        path.unlink()
    [path] = shards(videos)
    path.with_name(f"{path.name[:17]}0.shard").symlink_to("missing")  # joined by another search
    loop = path.with_name(f"{path.name[:17]}z.shard")
    loop.symlink_to(loop)
    said, names = found(videos)
    assert names == before and "encoded 0 videos" in said and "symbolic links" in said


def test_many_small_shards_become_full_ones(videos, found, monkeypatch):
    """Their valid rows, also of files that are away."""
    monkeypatch.setattr(store, "SMALL", 3)
    monkeypatch.setattr(store, "FULL", 3)
    found(videos)  # a full one, and one of a single file
    [full, _] = shards(videos)
    (videos / "3.mp4").rename(videos / "away")
    for k in (4, 5, 6):
        noise_video(videos / "4.mp4", k)  # changes
        os.utime(videos / "4.mp4", ns=(k, k))
        before = found(videos)[1]
    assert shards(videos)[0] == full and len(shards(videos)) == 2
    content = torch.load(shards(videos)[1], weights_only=True)
    assert [x[0] for x in content["files"]] == ["3.mp4", "4.mp4"]
    assert found(videos)[1] == before
    (videos / "away").rename(videos / "3.mp4")
    said, names = found(videos)
    assert "encoded 0 videos, 5 in" in said and "3.mp4" in names


def test_an_index_stays_in_use():
    """The fingerprint of a model is what it was when the format was fixed, as written down then."""
    clip = small_clip(8)
    model = TMASS(clip, frames=4)
    for x in clip.visual.state_dict().values():
        x.copy_(torch.arange(x.numel()).view_as(x) / 7)
    assert store.fingerprint(model, 10) == "f9a7b0b5a8e42c53"
    assert store.fingerprint(model, 2.5) == "3c42eb476f2f7f67"
    for k in range(64):  # any weight counts
        before = store.fingerprint(model, 10)
        with torch.no_grad():
            clip.visual.proj[k, k % 8] += 1e-3
        assert store.fingerprint(model, 10) != before
