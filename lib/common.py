"""Shared by all programs: errors, options, printing, files written whole, and exit status."""
import argparse
import contextlib
import errno
import math
import os
import re
import secrets
import signal
import sys
import time
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

# ---- errors ----


class UserError(ValueError):
    """A mistake that the user can fix: one line that says what, where, and what to do."""


class DataError(UserError):
    """A problem with the user's data, options or machine."""


class WeightsError(UserError):
    """A problem with a weights file, or with the model to be built from it."""


CURES = {  # pattern in an error of the system, Python or torch -> advice
    "out of memory|allocate memory|not enough memory|ALLOC_FAILED|MemoryError":
        "use a smaller --batch, --amp bf16, fewer --workers or, in training, --chunk 64",
    "Too many open files|items of ancdata":
        "use fewer --workers, or allow more files (ulimit -n 4096)",
    "File too large": "allow larger files (ulimit -f unlimited)",
    "shared memory|torch_.*(No space left|Bus error)":
        "give /dev/shm more room (docker run --shm-size 8g, or --ipc=host), or use fewer --workers",
    "determine home directory": "set TMASS_CACHE or HOME to a folder that exists",
}


def cure(error):
    """The advice for an error caused by a limit of the machine; None for any other error."""
    text = f"{type(error).__name__}: {error}"
    for pattern, advice in CURES.items():
        if re.search(pattern, text, re.IGNORECASE):
            return advice
    return None


def first_line(error):
    """The first line of an error's message (torch appends a stack); its type if that is empty.

    If DataLoader passes an error on from a worker, the message ends with the error itself.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1] if lines[0].startswith("Caught ") else lines[0]


@contextlib.contextmanager
def curable(what):
    """Turn an error that `cure` has advice for into a DataError with that advice."""
    try:
        yield
    except (OSError, RuntimeError, MemoryError) as e:
        if not cure(e):
            raise
        raise DataError(f"{what} ({first_line(e)}): {cure(e)}") from e


# A file may hold anything. While it is interpreted, these errors are due to its content.
MISTAKES = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError)


@contextlib.contextmanager
def explained(path, what, advice):
    """Turn any error caused by the content of a file into a WeightsError of one line."""
    with curable(f"{path}: no room to load it"):
        try:
            yield
        except DataError:  # of something else
            raise
        except MISTAKES as error:
            # Not the file's fault, but a limit of the machine.
            if cure(error):
                raise
            why = shorten(str(error), 500)
            if isinstance(error, KeyError):
                why = f"it has no {error}"
            raise WeightsError(f"{path}: {what}: {why}; {advice}") from None


# ---- options and numbers ----


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose mistakes are one line and exit status 2, as of everything else.

    The first two paragraphs of the program's docstring describe it.
    """

    def __init__(self, doc=None, **settings):
        paragraphs = (doc or "").split("\n\n")  # python -OO: there is none
        super().__init__(
            description="\n\n".join(paragraphs[:2]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **settings,
        )

    def error(self, message):
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def numeric(kind, least, most=2 ** 31 - 1):
    """The type of a numeric option: an int or float from least to most. NaN is refused."""
    name = "a whole number" if kind is int else "a number"

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {name} from {least:g} to {most:g}")
        return value

    return parse


def mixed_seed(*numbers):
    """Mix whole numbers, such as (seed, step), into one seed. All seeds are mixed here."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number) % 2 ** 63
    return mixed


# ---- what is printed ----


def escaped(text, keep=""):
    """Make text from any source, such as a file name, safe to print on a terminal.

    Characters that could move the cursor or reverse the direction of writing are replaced by
    \\x1b and the like, except those in `keep`.
    """
    def escape(c):
        # Control and direction characters, code points without text, line and paragraph separators.
        odd = re.match("C|Z[lp]", unicodedata.category(c))
        return c.encode("unicode_escape").decode() if odd and c not in keep else c

    return "".join(map(escape, text))


def first_few(lines):
    """The first ten lines, `escaped`; if there are more, another line says how many. -> list"""
    more = [f"and {len(lines) - 10} more"] if len(lines) > 10 else []
    return [*map(escaped, lines[:10]), *more]


def clock(seconds):
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


@dataclass
class Progress:
    """Progress of a loop, on stderr: "encoding: 40 of 500 videos, 12.5 videos/s, 0:00:37 left".

    Prints at most once every `every` seconds. On a terminal, the same line is overwritten.
    """
    what: str
    total: int
    unit: str = "videos"
    every: float = 20
    enabled: bool = True

    def __post_init__(self):
        self.terminal = self.enabled and sys.stderr.isatty()
        if self.terminal:
            self.every = min(self.every, 2)
        self.started = time.monotonic()
        self.printed = self.started

    def update(self, done, more=""):
        """Print a line if it is time for one. more: text to append to it."""
        now = time.monotonic()
        if not self.enabled or now - self.printed < self.every:
            return
        self.printed = now
        rate = done / (now - self.started)
        left = clock((self.total - done) / rate) if done else "an unknown time"
        line = f"{self.what}: {done} of {self.total} {self.unit}, {rate:.1f} {self.unit}/s, "
        end = "\r" if self.terminal else "\n"
        print(f"{line}{left} left{more}".ljust(78), end=end, file=sys.stderr, flush=True)


# ---- files ----


def spelled(path):
    """A path as the disk spells it, with é as one character or two. A missing one is unchanged."""
    path = os.fspath(path)
    folder, name = os.path.split(path)
    if path.isascii() or not name or os.path.exists(path):
        return path
    folder = spelled(folder)
    for form in ("NFC", "NFD"):
        other = os.path.join(folder, unicodedata.normalize(form, name))
        if os.path.exists(other):
            return other
    return path


@contextlib.contextmanager
def written_whole(path, flush=True):
    """Yield a temporary name beside path. What is written there replaces path if all goes well.

    A kill or a power cut leaves the old file or the new one. flush=False is for files that can be
    made again: it is faster, but a power cut may leave an empty file.
    """
    path = os.path.realpath(path)  # a link stays a link
    folder, name = os.path.split(path)
    part = os.path.join(folder, f"{name[:50]}.{secrets.token_hex(4)}.part")  # not too long a name
    try:
        yield part
        if flush:  # the new name may reach the disk before the content does
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:  # also KeyboardInterrupt
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise


def write_whole(path, content):
    """Write a file of text or bytes, whole or not at all."""
    if isinstance(content, str):
        content = content.encode()
    with written_whole(path) as part:
        Path(part).write_bytes(content)


def write_output(option, path, content):
    """`write_whole` for the file of an option. A DataError says why it can't be written."""
    try:
        write_whole(path, content)
    except OSError as e:
        raise DataError(f"{option} {path} cannot be written: {why_not_written(e)}") from e


def check_outputs(outputs, inputs):
    """Refuse early what `write_output` must not replace. outputs: {option: path or None}.

    Raises a DataError for what is no file in a folder, for one file of two options, and for one of
    inputs: files that the command reads, and folders of which it reads the files.
    """
    taken = set(map(os.path.realpath, inputs))
    for option, path in outputs.items():
        if path is None:
            continue
        real = os.path.realpath(path)
        folder = os.path.dirname(real)
        if real in taken or folder in taken:
            raise DataError(f"{option} {path}: this command reads or writes that file, or reads "
                            "its folder: give another name")
        taken.add(real)
        plain = os.path.isfile(real) or not os.path.exists(real)
        if not os.path.basename(path) or not plain or not os.path.isdir(folder):
            raise DataError(f"{option} {path} cannot be written: give a plain file's name in a "
                            "folder that exists")


def why_not_written(error):
    """The system's reason for a failed write, even behind a RuntimeError of torch; else None."""
    while error and not isinstance(error, OSError):
        error = error.__context__
    if getattr(error, "errno", None) == errno.ENOSPC:
        return "the disk is full"
    return error and (error.strerror or str(error))


# ---- how a program ends ----


def program(main, *mistakes):
    """Run a program's main function. -> exit status.

    A user's mistake (UserError or one of `mistakes`) or an error of the system prints one line on
    stderr and gives status 2. Standard output need not be read to its end (| head).
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # file names may hold what the encoding lacks
            stream.reconfigure(errors="backslashreplace")
    try:
        status = main()
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is in its buffer
        return 0
    except (UserError, *mistakes) as e:
        line = str(e)
    except KeyboardInterrupt as e:
        print("interrupted", file=sys.stderr)
        number = e.args[0] if e.args else signal.SIGINT
        return 128 + number
    except (OSError, RuntimeError, MemoryError) as e:  # many are RuntimeErrors in torch
        line = first_line(e)
        if advice := cure(e):
            line += f": {advice}"
        elif not isinstance(e, OSError):
            raise  # a bug in the program: show its stack
    print(f"error: {escaped(line)}", file=sys.stderr)
    return 2
