"""What all programs share: errors, numbers, what is printed, files written whole, how they end."""
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from lib.common import (
    DataError,
    Progress,
    clock,
    curable,
    cure,
    escaped,
    explained,
    first_few,
    mixed_seed,
    numeric,
    program,
    write_whole,
    written_whole,
)

# ---- errors, and how a program ends ----


@pytest.mark.parametrize("error, advice", [
    (OSError(errno.EMFILE, "Too many open files"), "use fewer --workers"),
    (MemoryError(), "use a smaller --batch"),
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nstack"), "use a smaller --batch"),
    (RuntimeError("unable to write to file </torch_1_2>: No space left on device (28)"),
     "give /dev/shm more room"),
])
def test_limits_of_the_machine_have_advice(error, advice):
    with pytest.raises(DataError, match=rf"^reading \(.*\): {advice}.*$"), curable("reading"):
        raise error
    # A file is not to blame for them.
    with pytest.raises(DataError, match="^m.pt: no room"), explained("m.pt", "none", "train again"):
        raise error


@pytest.mark.parametrize("error, status, line", [
    (DataError("a.csv, row 3: no\x1b[2J caption"), 2, "error: a.csv, row 3: no\\x1b[2J caption\n"),
    (PermissionError(errno.EACCES, "Permission denied", "a.csv"), 2,
     "error: [Errno 13] Permission denied: 'a.csv'\n"),
    (MemoryError(), 2, f"error: MemoryError: {cure(MemoryError())}\n"),
    (KeyboardInterrupt(), 130, "interrupted\n"),
    (KeyboardInterrupt(signal.SIGTERM), 143, "interrupted\n"),
    (RuntimeError("boom"), None, ""),  # a fault of the program keeps its stack
    (KeyError("x"), None, ""),
])
def test_a_program_ends_with_a_status_and_a_line(error, status, line, capsys):
    def main():
        raise error

    if status is None:
        with pytest.raises(type(error)):
            program(main)
    else:
        assert program(main) == status
    assert capsys.readouterr() == ("", line)


PRINTS = """
import sys
from lib.common import program

def main():
    for _ in range(20_000):
        print("caf\\udce9", flush=True)
    return 1

sys.exit(program(main))
"""


def test_output_that_nobody_reads_to_its_end():
    """It is more than a pipe holds. The name in it can't be encoded."""
    command = ["bash", "-c", '"$0" -c "$1" | head -n 1; echo $PIPESTATUS', sys.executable, PRINTS]
    done = subprocess.run(command, cwd=ROOT, timeout=60, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("caf\\udce9\n0\n", "")


# ---- numbers and what is printed ----


def test_numbers_out_of_range():
    assert numeric(float, 0, 1)("0.5") == 0.5
    for value in ("nan", "inf", "-1", "1.01", "x", "9" * 5000):
        with pytest.raises(Exception, match="is not a number from 0 to 1$"):
            numeric(float, 0, 1)(value)


def test_mixed_seeds_differ():
    numbers = [(24, 0), (24, 1), (25, 0), (0, 24), (24, 0, 0), (24, 0, 1), (2 ** 63 - 1, 5)]
    seeds = {mixed_seed(*n) for n in numbers}
    assert len(seeds) == len(numbers) and max(seeds) < 2 ** 63
    assert mixed_seed(24, 7) == 24 * 1_000_003 + 7  # the videos of shapes are drawn from such seeds


def test_clock_and_escapes():
    assert [clock(x) for x in (59.9, 61, 108_005)] == ["0:00:59", "0:01:01", "30:00:05"]
    assert escaped("a\x1b[2J\u202e\u2028é\n") == "a\\x1b[2J\\u202e\\u2028é\\n"
    assert escaped("a\nb\t", keep="\n") == "a\nb\\t"
    assert first_few(["\n"] * 12) == ["\\n"] * 10 + ["and 2 more"]


def test_progress(capsys):
    Progress("encoding", 100, every=60).update(40)
    Progress("encoding", 100, unit="files", every=0).update(40, ", 1 bad")
    line = capsys.readouterr().err
    assert line.startswith("encoding: 40 of 100 files, ") and "0:00:00 left, 1 bad" in line


# ---- files written whole ----


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "result.txt"
    write_whole(path, "one")
    with pytest.raises(KeyboardInterrupt), written_whole(path) as part:
        Path(part).write_text("half")
        assert path.read_text() == "one" and os.path.dirname(part) == str(tmp_path)
        raise KeyboardInterrupt
    assert path.read_text() == "one" and os.listdir(tmp_path) == ["result.txt"]


WRITER = """
import time
from pathlib import Path
from lib.common import written_whole

with written_whole("result.txt") as part:
    Path(part).write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_a_killed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "result.txt"
    path.write_text("one")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WRITER]
    with subprocess.Popen(command, env=env, cwd=tmp_path, stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline() == b"writing\n"
        writer.kill()
    assert path.read_text() == "one"
    write_whole(path, b"two")
    assert path.read_text() == "two"
