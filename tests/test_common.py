"""What all programs share: options, what is printed, files written whole, and how they end."""
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from lib.common import (
    DataError,
    Parser,
    Progress,
    WeightsError,
    check_outputs,
    clock,
    curable,
    cure,
    escaped,
    explained,
    first_few,
    mixed_seed,
    numeric,
    program,
    write_output,
    write_whole,
    written_whole,
)

# ---- errors ----

NO_MEMORY = RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate "
                         "memory: you tried to allocate 99 bytes.\nstack")
NO_SHM = RuntimeError("unable to write to file </torch_1_2>: No space left on device (28)")


@pytest.mark.parametrize("error, advice", [
    (OSError(errno.EMFILE, "Too many open files"), "use fewer --workers"),
    (RuntimeError("received 0 items of ancdata"), "use fewer --workers"),
    (MemoryError(), "use a smaller --batch"),
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "use a smaller --batch"),
    (NO_MEMORY, "use a smaller --batch"),
    (NO_SHM, "give /dev/shm more room"),
])
def test_limits_of_the_machine_have_advice(error, advice):
    assert cure(error).startswith(advice)
    with pytest.raises(DataError, match=f"^reading \\(.*\\): {advice}") as raised:
        with curable("reading"):
            raise error
    assert "\n" not in str(raised.value)
    # A file is not to blame for them.
    with pytest.raises(DataError, match="^m.pt: no room to load it"):
        with explained("m.pt", "no checkpoint", "train again"):
            raise error


@pytest.mark.parametrize("error, why", [
    (KeyError("merges"), "it has no 'merges'"),
    (TypeError("not\nan int"), "not an int"),
    (RuntimeError("size mismatch " * 99), "size mismatch"),
])
def test_mistakes_in_a_file_are_explained_in_one_line(error, why):
    with pytest.raises(WeightsError, match=f"^m.pt: no checkpoint: {why}.*; train again$") as found:
        with explained("m.pt", "no checkpoint", "train again"):
            raise error
    assert len(str(found.value)) < 600


# ---- how a program ends ----


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize("error, status, line", [
    (DataError("a.csv, row 3: no\x1b[2J caption"), 2, "error: a.csv, row 3: no\\x1b[2J caption\n"),
    (WeightsError("m.pt: no such file"), 2, "error: m.pt: no such file\n"),
    (PermissionError(errno.EACCES, "Permission denied", "a.csv"), 2,
     "error: [Errno 13] Permission denied: 'a.csv'\n"),
    (MemoryError(), 2, f"error: MemoryError: {cure(MemoryError())}\n"),
    (KeyboardInterrupt(), 130, "interrupted\n"),
    (KeyboardInterrupt(signal.SIGTERM), 143, "interrupted\n"),
])
def test_a_program_ends_with_a_status_and_a_line(error, status, line, capsys):
    assert program(raising(error)) == status
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyError("x"), ValueError("y")])
def test_faults_of_a_program_keep_their_stack(error, capsys):
    assert cure(error) is None
    with pytest.raises(type(error)):
        program(raising(error))
    assert program(raising(error), type(error)) == 2  # what the program declares to be a mistake
    assert capsys.readouterr().err.startswith("error: ")


PRINTS = """
import sys
from lib.common import program

def main():
    for _ in range(20_000):
        print("caf\\udce9", flush=True)
    return 1

sys.exit(program(main))
"""


def test_output_that_nobody_reads_to_its_end(tmp_path):
    """It is more than a pipe holds. The name in it can't be encoded."""
    (tmp_path / "program.py").write_text(PRINTS)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8:strict"}
    line = f"{sys.executable} program.py | head -n 1; echo ${{PIPESTATUS[0]}}"
    command = ["bash", "-c", line]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, timeout=60, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("caf\\udce9\n0\n", "")


# ---- options ----


DOC = """Does it.

    python it.py

What is of no use here."""


@pytest.mark.parametrize("words, line", [
    ("--epochs 0", "argument --epochs: '0' is not a whole number from 1 to 10"),
    ("--epochs 1e1", "'1e1'"),
    ("--epoch 3", "--epoch 3"),
    ("--colour red", "--colour"),
])
def test_wrong_options_are_one_line(words, line, capsys):
    parser = Parser(DOC)
    parser.add_argument("--epochs", type=numeric(int, 1, 10))
    assert parser.parse_args(["--epochs=3"]).epochs == 3
    with pytest.raises(SystemExit) as end:
        parser.parse_args(words.split())
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("error: ")
    assert line in err and err.count("\n") == 1


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "1.01", "x", "9" * 5000])
def test_numbers_out_of_range(value):
    assert numeric(float, 0, 1)("0.5") == 0.5
    with pytest.raises(Exception, match="is not a number from 0 to 1$"):
        numeric(float, 0, 1)(value)


def test_help_begins_with_the_docstring_if_there_is_one():
    assert Parser(DOC).description == "Does it.\n\n    python it.py"
    assert Parser(None).format_help()  # python -OO leaves no docstring


# ---- numbers and what is printed ----


def test_mixed_seeds_differ():
    numbers = [(24, 0), (24, 1), (25, 0), (0, 24), (24, 0, 0), (24, 0, 1), (2 ** 63 - 1, 5)]
    seeds = [mixed_seed(*n) for n in numbers]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2 ** 63 for seed in seeds)
    assert mixed_seed(24, 7) == 24 * 1_000_003 + 7  # the videos of shapes are drawn from such seeds


def test_clock_and_escapes():
    assert [clock(x) for x in (0, 59.9, 61)] == ["0:00:00", "0:00:59", "0:01:01"]
    assert clock(30 * 3600 + 5) == "30:00:05"
    assert escaped("a\x1b[2J\u202e\u2028é\n") == "a\\x1b[2J\\u202e\\u2028é\\n"
    assert escaped("a\nb\t", keep="\n") == "a\nb\\t"
    assert first_few(["\n"] * 12) == ["\\n"] * 10 + ["and 2 more"]


def test_progress_tells_rate_and_time_left(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress("encoding", 100, unit="files", every=20)
    silent = Progress("encoding", 100, enabled=False)
    for second, done in ((10, 0), (25, 0), (40, 20), (50, 40), (60, 40)):
        now[0] = second
        progress.update(done, ", 1 bad")
        silent.update(done)
    lines = [line.rstrip() for line in capsys.readouterr().err.splitlines()]
    assert lines == ["encoding: 0 of 100 files, 0.0 files/s, an unknown time left, 1 bad",
                     "encoding: 40 of 100 files, 0.8 files/s, 0:01:15 left, 1 bad"]


# ---- files written whole ----


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_file_is_written_whole_or_not_at_all(here):
    path = here / "result.txt"
    write_whole(path, "one")
    for error in (ZeroDivisionError, KeyboardInterrupt):
        with pytest.raises(error):
            with written_whole(path) as part:
                Path(part).write_text("half")
                assert path.read_text() == "one" and os.path.dirname(part) == str(here)
                raise error
        assert path.read_text() == "one" and os.listdir() == ["result.txt"]
    write_whole(path, b"two")
    assert path.read_text() == "two" and os.listdir() == ["result.txt"]


WRITER = """
import sys, time
from pathlib import Path
from lib.common import written_whole

with written_whole("result.txt") as part:
    Path(part).write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_a_killed_write_leaves_the_old_file(here):
    Path("result.txt").write_text("one")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    writer = subprocess.Popen([sys.executable, "-c", WRITER], env=env, stdout=subprocess.PIPE)
    try:
        assert writer.stdout.readline() == b"writing\n"
    finally:
        writer.kill()
        writer.communicate(timeout=60)
    assert writer.returncode == -signal.SIGKILL and Path("result.txt").read_text() == "one"
    write_whole("result.txt", "two")
    assert Path("result.txt").read_text() == "two"


def test_outputs_that_cannot_be_written_are_refused_at_once(here):
    Path("file").touch()
    Path("link").symlink_to("file")
    os.mkfifo("pipe")
    os.mkdir("folder")
    before = sorted(os.listdir())
    for path in ("pipe", "folder", "folder/", "none/file", "file/x", "/dev/null"):
        with pytest.raises(DataError, match=f"^--json {path} cannot be written: "):
            check_outputs({"--json": path}, [])
    for inputs, path in ((["file"], "link"), (["link"], "folder/../file")):
        with pytest.raises(DataError, match=f"^--json {path}: this command reads"):
            check_outputs({"--json": path}, inputs)
    with pytest.raises(DataError, match="^--save link: this command reads"):
        check_outputs({"--json": "file", "--report": None, "--save": "link"}, [])
    check_outputs({"--json": "file", "--save": "folder/new"}, ["msrvtt", "pipe"])
    assert sorted(os.listdir()) == before


def test_an_output_replaces_its_file_and_a_link_stays_a_link(here):
    Path("file").write_text("old")
    Path("link").symlink_to("file")
    write_output("--json", "link", "new")
    assert Path("file").read_text() == "new" and os.path.islink("link")
    with pytest.raises(DataError, match="^--json none/x cannot be written: No such file or direc"):
        write_output("--json", "none/x", "new")


@pytest.mark.parametrize("error, why", [
    (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
    (OSError(errno.EIO, "Input/output error"), "Input/output error"),
])
def test_a_failed_write_is_called_by_its_reason(here, monkeypatch, error, why):
    monkeypatch.setattr(os, "fsync", lambda _: raising(error)())
    with pytest.raises(DataError, match=f"^--save out cannot be written: {why}$"):
        write_output("--save", "out", "content")
    assert os.listdir() == []
