"""Shared by all tests: our modules on sys.path, real annotation files where there are any, how to
run our scripts.
"""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "study")]
torch.set_num_threads(min(2, os.cpu_count() or 1))
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup, programs would ignore it
with contextlib.suppress(ImportError):  # optional; torch.hub shows downloads with it
    from tqdm import tqdm

    # Its monitor is a thread that never ends, and workers are not forked beside other threads.
    tqdm.monitor_interval = 0


# Code for a program whose videos can't be opened once there is a file "slow": in a job, those of
# process 1 alone.
SLOW = """
import os
import time

import av

plain = av.open

def slowly(*arguments, **options):
    if os.path.exists("slow"):  # as on a network disk that does not answer
        time.sleep(60)
    return plain(*arguments, **options)

if os.environ.get("RANK", "1") == "1":
    av.open = slowly
"""


def free_port():
    """A port that is free, and stays so: none of those that systems give whoever asks for any."""
    while True:
        port = 20_000 + secrets.randbelow(10_000)
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(("127.0.0.1", port))
            return str(port)


@pytest.fixture(scope="session")
def shared():
    """Real annotation files and CLIP's vocabulary, beside the project; not ours, so tests pass
    without them.
    """
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data")
    return folder


@pytest.fixture(scope="session")
def run():
    """run("train.py", "--epochs", 1, cwd=...) -> CompletedProcess with text output; the test
    judges the return code.
    """

    def run(script, *args, cwd=None, env=None, timeout=300, stdin=None):
        program = [str(ROOT / script)]
        env = {**os.environ, **(env or {})}
        if script.startswith("lib/"):  # a module of the package
            program = ["-m", script.removesuffix(".py").replace("/", ".")]
            env["PYTHONPATH"] = str(ROOT)
        command = [sys.executable, *program, *map(str, args)]
        return subprocess.run(
            command, cwd=cwd, env=env, timeout=timeout, input=stdin, capture_output=True, text=True
        )

    return run


@pytest.fixture
def soon():
    """A test may take 20 seconds, on a busy machine; then an exception ends it."""

    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
