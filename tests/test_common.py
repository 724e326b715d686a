"""What all programs share: options, standard streams, files written whole, and how they end."""
import _pyio
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import data
import lib.common
from lib.common import (
    DataError,
    Parser,
    Progress,
    WeightsError,
    check_output,
    clock,
    cure,
    escaped,
    mixed_seed,
    numeric,
    output,
    program,
    remove_parts,
    write_text,
    written_whole,
)
from lib.options import OUTPUTS, write_json
from lib.runs import only_run

ROOT = Path(lib.common.__file__).resolve().parent.parent
# Its result goes to out.txt; before and after, it prints more than a pipe holds.
PROGRAM = """
import sys
from lib.common import *
def main():
    for k in range(2):
        print("caf\\udce9 \\u4f60" * 20000, flush=True)
        print("progress", file=sys.stderr, flush=True)
        if k == 0:
            write_text("out.txt", "the result")
    return int(sys.argv[1])
sys.exit(program(main))
"""


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """shell("... PROGRAM 0 ...") -> CompletedProcess of a bash line in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "program.py").write_text(PROGRAM)

    def shell(line, **env):
        line = "set -o pipefail; " + line.replace("PROGRAM", f"{sys.executable} program.py")
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", **env}
        return subprocess.run(["bash", "-c", line], env=env, timeout=30,
                              capture_output=True, text=True)

    return shell


# ---- standard streams ----


@pytest.mark.parametrize("line, status, err", [
    ("PROGRAM 0 >&-", 0, "progress\nprogress\n"),
    ("PROGRAM 0 2>&-", 0, ""),
    ("PROGRAM 0 <&- >&- 2>&-", 0, ""),
    ("PROGRAM 1 >&-", 1, "progress\nprogress\n"),
    ("PROGRAM 0 | true", 0, "progress\nprogress\n"),
    ("PROGRAM 1 | head -c 5", 0, "progress\nprogress\n"),  # no verdict for who reads no further
    ("PROGRAM 143 | true", 143, "progress\nprogress\n"),
    ("PROGRAM 0 2>/dev/full", 0, ""),
    ("PROGRAM 0 >/dev/full", 2, "progress\nprogress\nerror: standard output cannot be written: "
                                "No space left on device\n"),
    ("PROGRAM 0 >/dev/full 2>&1", 2, ""),
])
def test_the_result_is_written_whoever_listens(shell, line, status, err):
    done = shell(line)
    assert (done.returncode, done.stderr) == (status, err)
    assert Path("out.txt").read_text() == "the result"


def test_a_closed_stream_is_not_the_next_file_that_is_opened(shell):
    """Else what a library prints would go into the result."""
    code = ("import os; from lib.common import *; n = open('n.txt', 'w'); "
            "program(lambda: print(os.open('new.txt', os.O_CREAT | os.O_WRONLY), file=n))")
    shell(f'{sys.executable} -c "{code}" <&- >&- 2>&-')
    assert int(Path("n.txt").read_text()) > 2


def test_names_that_the_encoding_lacks_are_escaped(shell):
    shown = {"ascii": "caf\\udce9 \\u4f60", "utf-8": "caf\\udce9 你", "latin-1": "caf\\udce9"}
    for encoding, text in shown.items():
        done = shell("PROGRAM 0", PYTHONIOENCODING=f"{encoding}:strict")
        assert done.returncode == 0 and done.stdout.startswith(text), done


# ---- how a program ends ----


@pytest.mark.parametrize("error, line", [
    (DataError("a.csv, row 3: no\x1b[2J caption"), "a.csv, row 3: no\\x1b[2J caption"),
    (WeightsError("m.pt: no such file"), "m.pt: no such file"),
    (OSError(errno.EACCES, "Permission denied", "a.csv"), "[Errno 13] Permission denied: 'a.csv'"),
    (OSError(errno.EMFILE, "Too many open files"),
     "[Errno 24] Too many open files: use fewer --workers"),
    (MemoryError(), "MemoryError: use a smaller --batch, --amp bf16"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't "
                  "allocate memory: you tried to allocate 99 bytes.\nstack"),
     "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't "
     "allocate memory: you tried to allocate 99 bytes.: use a smaller --batch"),
    (RuntimeError("CUDA out of memory. Tried 2 GiB"), "CUDA out of memory. Tried 2 GiB: use a"),
    (RuntimeError("unable to write to file </torch_1_2>: No space left on device (28)"),
     "unable to write to file </torch_1_2>: No space left on device (28): give /dev/shm more"),
])
def test_errors_of_user_and_system_are_one_line(error, line, capsys):
    def main():
        raise error

    assert program(main) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {line}")
    assert err.count("\n") == 1 and err.endswith("\n")


def test_faults_of_a_program_keep_their_stack(capsys):
    for error in (RuntimeError("boom"), KeyError("x"), ValueError("y")):
        def main():
            raise error

        assert cure(error) is None
        with pytest.raises(type(error)):
            program(main)
    assert program(main, ValueError) == 2 and capsys.readouterr().err == "error: y\n"


def test_an_interrupt_is_said(capsys):
    def main():
        raise KeyboardInterrupt

    assert program(main) == 130 and capsys.readouterr().err == "interrupted\n"


# ---- options ----

DOC = """Does it.

    python it.py

What is of no use here."""


def test_wrong_options_are_one_line(capsys):
    parser = Parser(DOC)
    parser.add_argument("--out")
    parser.add_argument("--epochs", type=numeric(int, 1, 10))
    assert parser.parse_args(["--out=a--", "--epochs=3"]).epochs == 3
    wrong = {("--out=--",): "argument --out: '--' is no value",
             ("--epochs=--",): "--epochs",
             ("--epochs", "0"): "'0' is not a whole number from 1 to 10",
             ("--epochs", "1e1"): "'1e1'",
             ("--colour",): "--colour"}
    for words, line in wrong.items():
        with pytest.raises(SystemExit) as end:
            parser.parse_args(words)
        err = capsys.readouterr().err
        assert end.value.code == 2 and err.startswith("error: ")
        assert line in err and err.count("\n") == 1
    for value in ("nan", "inf", "-1", "x", "9" * 5000):
        with pytest.raises(Exception, match="is not a number from 0 to 1$"):
            numeric(float, 0, 1)(value)


def test_help_begins_with_the_docstring_if_there_is_one():
    assert Parser(DOC).description == "Does it.\n\n    python it.py"
    assert Parser(None).format_help()  # python -OO leaves no docstring


@pytest.mark.slow  # all of torch is compiled anew
@pytest.mark.parametrize("program", ["train.py", "eval.py", "search.py", "data.py"])
def test_optimised_python_runs_all_programs(program, run):
    done = run(program, "--help", env=dict(PYTHONOPTIMIZE="2"), timeout=60)
    assert done.returncode == 0 and done.stderr == ""


# ---- numbers and what is printed ----


def test_mixed_seeds_differ():
    numbers = [(24, 0), (24, 1), (25, 0), (0, 24), (24, 0, 0), (24, 0, 1), (24, 1, 0),
               (2 ** 63 - 1, 5)]
    seeds = [mixed_seed(*n) for n in numbers]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2 ** 63 for seed in seeds)
    assert mixed_seed(24, 7) == 24 * 1_000_003 + 7  # the videos of shapes are drawn from such seeds


def test_clock_and_escapes():
    assert [clock(x) for x in (0, 59.9, 61)] == ["0:00:00", "0:00:59", "0:01:01"]
    assert clock(30 * 3600 + 5) == "30:00:05"
    assert escaped("a\x1b[2J\u202e\u2028é\n") == "a\\x1b[2J\\u202e\\u2028é\\n"
    assert escaped("a\nb\t", keep="\n") == "a\nb\\t"


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


def parts(folder):
    return sorted(path.name for path in Path(folder).glob("*.part"))


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "result.txt"
    write_text(path, "one")
    with pytest.raises(ZeroDivisionError):
        with written_whole(path) as part:
            Path(part).write_text("half")
            assert path.read_text() == "one" and parts(tmp_path) == [os.path.basename(part)]
            1 / 0
    assert path.read_text() == "one" and parts(tmp_path) == []
    with written_whole(str(path), flush=False) as part:
        Path(part).write_text("two")
    assert path.read_text() == "two" and os.listdir(tmp_path) == ["result.txt"]


def test_what_is_written_is_flushed_before_it_takes_its_name(tmp_path, monkeypatch):
    events = []

    def noted(name, plain):
        return lambda *arguments: events.append(name) or plain(*arguments)

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, noted(name, getattr(os, name)))
    write_text(tmp_path / "result.txt", "one")
    assert events == ["fsync", "replace"]


WRITER = """
import signal, sys, time
from pathlib import Path
from lib.common import *
with written_whole(sys.argv[1]) as part:
    Path(part).write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_parts_of_killed_writes_are_removed_and_others_not(tmp_path):
    path = tmp_path / "my [1].json"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WRITER, str(path)]
    writers = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE) for _ in range(2)]
    try:
        assert [writer.stdout.readline() for writer in writers] == [b"writing\n"] * 2
        users = ["my 1.json.7.0123abcd.part", "my [1].json.old.part", "my [1].json.part"]
        for name in users:
            (tmp_path / name).write_text("the user's")
        (tmp_path / "my [1].json.7-0123abcd.part").write_text("an older program's")
        before = parts(tmp_path)
        os.kill(writers[0].pid, signal.SIGKILL)
        writers[0].wait(10)
        check_output("--json", path)
        removed = set(before) - set(parts(tmp_path))
        assert len(removed) == 2 and "my [1].json.7-0123abcd.part" in removed  # not the other's
        os.kill(writers[1].pid, signal.SIGKILL)
        writers[1].wait(10)
        remove_parts(path)
        assert parts(tmp_path) == users
    finally:
        for writer in writers:
            writer.kill()


def test_processes_that_check_and_write_the_same_result_do_not_disturb_each_other(tmp_path):
    """As torchrun's do: one looks for parts that were left while another begins to write."""
    code = ("from lib.common import *\n"
            "for _ in range(600):\n"
            "    check_output('--json', sys.argv[1], b'x')\n"
            "    write_text(sys.argv[1], 'x')\n")
    command = [sys.executable, "-c", code, str(tmp_path / "result.json")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    jobs = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE) for _ in range(3)]
    try:
        assert [job.communicate(timeout=60)[1] for job in jobs] == [b""] * 3
        assert os.listdir(tmp_path) == ["result.json"]
    finally:
        for job in jobs:
            job.kill()


def test_outputs_replace_only_what_their_option_wrote(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mark = b"tmass scores"
    for content, mine in ((b"", True), (b"{}", True), (b"PK..tmass scores", True), (b"PK", False),
                          (b"x" * 5000 + b"tmass scores", False)):
        Path("result").write_bytes(content)
        if mine:
            check_output("--save", "result", mark)
        else:
            with pytest.raises(DataError, match="^--save result exists and was not written by --s"):
                check_output("--save", "result", mark)
            check_output("--save", "result")
        assert Path("result").read_bytes() == content and os.listdir() == ["result"]


def test_outputs_that_cannot_be_written_are_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("link").symlink_to("file")
    os.mkfifo("pipe")
    os.mkdir("folder")
    for path in ("", "link", "pipe", "folder", "folder/", "none/file", "file/x", "/dev/null",
                 "n" * 245):
        with pytest.raises(DataError, match="^--json .*cannot be written: "):
            check_output("--json", path)
    check_output("--json", "n" * 200)
    assert sorted(os.listdir()) == ["file", "folder", "link", "pipe"]


def test_a_failed_write_is_called_by_its_reason(tmp_path):
    """As torch says it too: a RuntimeError in front of the system's error."""
    def torch_writes(error):
        try:
            raise error
        except OSError:
            raise RuntimeError("PytorchStreamWriter failed")

    full = OSError(errno.ENOSPC, "No space left on device")
    broken = OSError(errno.EIO, "Input/output error")
    for error, why in ((full, "the disk is full"), (broken, "Input/output error")):
        with pytest.raises(DataError, match=f"^--save .*out cannot be written: {why}$"):
            with output("--save", tmp_path / "out"):
                torch_writes(error)
    with pytest.raises(RuntimeError, match="boom"):
        with output("--save", tmp_path / "out"):
            raise RuntimeError("boom")
    assert os.listdir(tmp_path) == []


@pytest.fixture
def windows(monkeypatch):
    """As on Windows: no locks, lines end in \\r\\n, an open file is neither renamed nor deleted."""
    def refusing(act):
        def if_closed(path, *more):
            for link in Path("/proc/self/fd").iterdir():
                if os.path.realpath(link) == os.path.realpath(path):
                    raise PermissionError(errno.EACCES, "it is being used by another process", path)
            return act(path, *more)
        return if_closed

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs Linux, to see which files are open")
    monkeypatch.setattr(lib.common, "fcntl", None)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setattr(os, "linesep", "\r\n")
    for name in ("unlink", "replace"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    for module in ("io", "builtins"):
        monkeypatch.setattr(f"{module}.open", _pyio.open)


def test_windows_neither_renames_nor_deletes_open_files(windows, tmp_path):
    out = str(tmp_path / "model.pt")
    for _ in range(2):
        with only_run(out):
            write_text(out, "weights")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_on_windows_each_option_recognises_its_own_file(windows, tmp_path):
    path = tmp_path / "result.json"
    for _ in range(2):
        check_output("--json", path, OUTPUTS["--json"])
        write_json(path, dict(R1=1))
    (tmp_path / "my.csv").write_text("video,caption\nno.mp4,a dog\n")
    options = f"check --data {tmp_path}/my.csv --list {tmp_path}/bad.csv"
    for _ in range(2):
        assert data.main(options.split()) == 1
