"""Shared by all programs: errors, options, files written whole, and how a program ends."""
import argparse
import contextlib
import errno
import math
import os
import secrets
import stat
import sys
import time
import unicodedata
from pathlib import Path


class UserError(ValueError):
    """A mistake that the user can mend: one line that says what, where, and what to do."""


class DataError(UserError):
    """Something about the user's data, options or machine."""


class WeightsError(UserError):
    """Something about a file of weights, or about the model that is to be made of it."""


class Parser(argparse.ArgumentParser):
    """Wrong options end as every user mistake does: one line, exit status 2."""

    def error(self, message):
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def escaped(text, keep=""):
    """Names come from anywhere: what could move a terminal's cursor, or turn the writing round, is shown as \\x1b."""
    odd = lambda c: c not in keep and (unicodedata.category(c)[0] == "C" or c in "\u2028\u2029")
    return "".join(c.encode("unicode_escape").decode() if odd(c) else c for c in text)


def clock(seconds):
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def numeric(kind, least, most=2 ** 31 - 1):
    """The type of a numeric option: int or float from least to most; NaN and infinity are neither."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            says = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {says} from {least:g} to {most:g}")
        return value
    return parse


def mixed_seed(*numbers):
    """One seed of several whole numbers, such as (seed, step): the only way that they are mixed. -> int"""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number) % 2 ** 63
    return mixed


class Progress:
    """How far a loop is, on stderr: "encoding: 40 of 500 videos, 12.5 videos/s, 0:00:37 left".

    A line comes at most every `every` seconds; at a terminal, one line is written anew.
    """

    def __init__(self, what, total, unit="videos", every=20, enabled=True):
        self.what = what
        self.total = total
        self.unit = unit
        self.enabled = enabled
        self.terminal = enabled and sys.stderr.isatty()
        self.every = min(every, 2) if self.terminal else every
        self.started = time.monotonic()
        self.printed = self.started

    def update(self, done, more=""):
        """To be called as often as one likes. more: said at the end of the line."""
        now = time.monotonic()
        if not self.enabled or now - self.printed < self.every:
            return
        self.printed = now
        rate = done / (now - self.started)
        left = clock((self.total - done) / rate) if done else "an unknown time"
        line = f"{self.what}: {done} of {self.total} {self.unit}, {rate:.1f} {self.unit}/s, "
        end = "\r" if self.terminal else "\n"
        print(f"{line}{left} left{more}".ljust(78), end=end, file=sys.stderr, flush=True)


def program(main, *mistakes):
    """The one way that a program ends: a mistake of the user (UserError, `mistakes`): one line, status 2."""
    try:
        status = main()
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # | head: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, *mistakes) as e:
        print(f"error: {escaped(str(e))}", file=sys.stderr)  # stderr escapes what it can't encode
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


@contextlib.contextmanager
def written_whole(path):
    """A temporary name beside path: what is written there is renamed to path if the block ends well, else removed."""
    part = f"{path}.{os.getpid()}.{secrets.token_hex(4)}.part"
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise


def check_output(option, path, begins=b"", holds=b""):
    """What the user has is never replaced, but by the next result of the same kind (as `begins` and `holds` tell).

    Results are renamed into place, which would do away with a link, a pipe or a device (/dev/stdout).
    """
    folder, exists, head = os.path.dirname(os.path.abspath(path)), os.path.lexists(path), b""
    usable = os.path.basename(path) and os.access(folder, os.W_OK)
    if exists:
        usable = usable and stat.S_ISREG(os.lstat(path).st_mode) and os.access(path, os.R_OK | os.W_OK)
    if not usable:
        raise DataError(f"{option} {path} cannot be written: give a plain file's name in a folder that exists")
    if exists:
        with open(path, "rb") as file:
            head = file.read(1000)
    if head and not (head.startswith(begins) and holds in head):
        raise DataError(f"{option} {path} exists and is no file that {option} wrote: give another name")


@contextlib.contextmanager
def output(option, path):
    """`written_whole` for a file that an option names: where it can't be written, a DataError says so."""
    try:
        with written_whole(path) as part:
            yield part
    except OSError as e:
        why = "the disk is full" if e.errno == errno.ENOSPC else e.strerror
        raise DataError(f"{option} {path} cannot be written: {why}") from e


def write_text(path, text):
    """A text file, whole or not at all."""
    with written_whole(path) as part:
        Path(part).write_text(text, encoding="utf-8", newline="")
