"""Shared by all programs: errors, options, printing, files written whole, and exit status."""
import argparse
import contextlib
import errno
import glob
import math
import os
import re
import secrets
import sys
import time
import unicodedata
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# ---- errors ----


class UserError(ValueError):
    """A mistake that the user can fix: one line that says what, where, and what to do."""


class DataError(UserError):
    """A problem with the user's data, options or machine."""


class WeightsError(UserError):
    """A problem with a weights file, or with the model to be built from it."""


CURES = {  # pattern in an error of the system, Python or torch -> advice
    "out of memory|allocate memory|not enough memory|ALLOC_FAILED|MemoryError":
        "use a smaller --batch, --amp bf16, fewer --workers or, in training, --grad-checkpoint",
    "Too many open files|items of ancdata":
        "use fewer --workers, or allow more files (ulimit -n 4096)",
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
    """The first line of an error's message (torch appends a stack); its type if that is empty."""
    text = str(error) or type(error).__name__
    return text.splitlines()[0]


@contextlib.contextmanager
def curable(what):
    """Turn an error that `cure` has advice for into a DataError with that advice."""
    try:
        yield
    except (OSError, RuntimeError, MemoryError) as e:
        if not cure(e):
            raise
        raise DataError(f"{what} ({first_line(e)}): {cure(e)}") from e


# ---- options and numbers ----


class Parser(argparse.ArgumentParser):
    """Options, described by the first two paragraphs of the program's docstring.

    A wrong one ends the program as every mistake does: one line, exit status 2.
    later: {name: value} of settings that are None until the program fills them in.
    """

    def __init__(self, doc=None, later=(), **settings):
        paragraphs = (doc or "").split("\n\n")  # python -OO: there is none
        super().__init__(
            description="\n\n".join(paragraphs[:2]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **settings,
        )
        self.later = dict(later)
        self.section = self

    def group(self, title):
        """List the options that follow under a title."""
        self.section = self.add_argument_group(title)

    def option(self, name, text, kind=None, default=None, short=None, **more):
        """Add --name. A second word in it stands for the value in the help: "save FILE".

        kind: the type of the value, or its choices; bool: the option takes no value.
        """
        name, _, metavar = name.partition(" ")
        shown = self.later.get(name.replace("-", "_"))
        if shown is None and default is not None:
            shown = "%(default)s"
        if kind is bool:
            more["action"] = "store_true"
            # None tells that the user did not give it, so that the program fills it in later.
            default = None if shown is not None else False
        elif kind:
            more["type" if callable(kind) else "choices"] = kind
        if metavar:
            more["metavar"] = metavar
        if shown is not None:
            text += f" (default: {shown})"
        flags = [short] if short else []
        self.section.add_argument(*flags, f"--{name}", help=text, default=default, **more)

    def parse_known_args(self, args=None, namespace=None):
        # Before Python 3.13, argparse makes an empty list of the value.
        for word in sys.argv[1:] if args is None else args:
            if re.fullmatch("-.*=--", word):
                self.error(f"argument {word[:-3]}: '--' is no value")
        return super().parse_known_args(args, namespace)

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


def first_few(lines):
    """The first ten lines; if there are more, another line says how many. -> list"""
    if len(lines) <= 10:
        return lines
    return [*lines[:10], f"and {len(lines) - 10} more"]


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


class _Output:
    """A standard stream whose failure does not end the program.

    Once its reader has gone or its disk is full, printed text is discarded, and `error` keeps the
    reason. The files that the user asked for are still written.
    """

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")
        self.error = None
        # File names may hold characters that the stream's encoding lacks.
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")

    def write(self, text):
        return self._attempt(self.stream.write, text)

    def flush(self):
        return self._attempt(self.stream.flush)

    def _attempt(self, act, *arguments):
        try:
            return act(*arguments)
        except OSError as e:
            self.error = e
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())  # also discards what is still in its buffer
            os.close(nowhere)

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextlib.contextmanager
def _lasting_streams():
    """Make sys.stdout and sys.stderr `_Output`s in this block; reopen closed ones on os.devnull."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # otherwise the next file to be opened would become the standard stream
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or open(os.devnull)
    out = _Output(sys.stdout)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(_Output(sys.stderr)):
        yield out


# ---- files written whole ----


@contextlib.contextmanager
def written_whole(path, flush=True):
    """Yield a temporary name beside path. What is written there replaces path if all goes well.

    A kill or a power cut leaves the old file or the new one, and perhaps the temporary file, which
    `remove_parts` removes. flush=False is for files that can be made again: it is faster, but a
    power cut may leave an empty file.
    """
    part, file = _begun(path)
    try:
        with file:
            yield part
            # The new name may reach the disk before the content does.
            if flush:
                os.fsync(file.fileno())
            close_on_windows(file)
            os.replace(part, path)  # while locked: no other process removes it
    # Also on KeyboardInterrupt: a part left behind would look like another run's.
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise


def _begun(path):
    """Create a temporary file beside path. -> (its name, the file), locked until it is closed."""
    while True:
        part = f"{path}.{os.getpid()}.{secrets.token_hex(4)}.part"
        file = open(part, "xb")
        _lock(file, wait=True)
        if os.path.exists(part):
            return part, file
        file.close()  # another process removed it as left behind, before it was locked


def close_on_windows(file):
    """Close a file on Windows, which neither renames nor deletes an open one."""
    if fcntl is None:
        file.close()


def _lock(file, wait=False):
    """Lock a file until it is closed. -> False if another process has, or if locks don't work."""
    # Comparing process ids would not do: different containers use the same few.
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return True
    except (OSError, AttributeError):  # AttributeError: Windows
        return False


def remove_parts(path):
    """Remove what killed writes of path left behind. A file being written is locked, and stays."""
    pattern = glob.escape(os.fspath(path)) + ".*" + 8 * "[0-9a-f]" + ".part"
    for part in glob.glob(pattern):
        with contextlib.suppress(OSError), open(part, "rb") as file:
            if _lock(file):
                os.unlink(part)


def check_output(option, path, mark=b""):
    """Raise a DataError unless the result of an option can go to path. Call it before long work.

    Only an empty file, or one that the same option wrote, is replaced: one with `mark` in its first
    4 kB (by default, any file). A link, pipe or device is never replaced.
    """
    start = b""
    try:
        plain = os.path.isfile(path) and not os.path.islink(path)
        if not os.path.basename(path) or os.path.lexists(path) and not plain:
            raise OSError("give a plain file's name in a folder that exists")
        part, file = _begun(path)  # fails without a writable folder, or if the name is too long
        with file:
            close_on_windows(file)
            os.unlink(part)
        if plain:
            with open(path, "r+b") as file:
                start = file.read(4096)
    except OSError as e:
        raise DataError(f"{option} {path} cannot be written: {e.strerror or e}") from None
    # Replacing an empty file loses nothing.
    if start not in (b"", b"{}") and mark not in start:
        raise DataError(f"{option} {path} exists and was not written by {option}: "
                        "give another name")
    remove_parts(path)


@contextlib.contextmanager
def output(option, path):
    """`written_whole` for the file of an option. A DataError says why it can't be written."""
    try:
        with written_whole(path) as part:
            yield part
    except (OSError, RuntimeError) as e:
        why = why_not_written(e)
        if not why:
            raise
        raise DataError(f"{option} {path} cannot be written: {why}") from e


def why_not_written(error):
    """The system's reason for a failed write, even behind a RuntimeError of torch; else None."""
    while error and not isinstance(error, OSError):
        error = error.__context__
    if getattr(error, "errno", None) == errno.ENOSPC:
        return "the disk is full"
    return error and (error.strerror or str(error))


def write_text(path, text):
    """Write a text file, whole or not at all."""
    with written_whole(path) as part:
        Path(part).write_text(text, encoding="utf-8", newline="")


# ---- how a program ends ----


def program(main, *mistakes):
    """Run a program's main function. -> exit status.

    A user's mistake (UserError or one of `mistakes`) or an error of the system prints one line on
    stderr and gives status 2. Standard output need not be read to its end (| head).
    """
    with _lasting_streams() as out:
        try:
            status = main()
            out.flush()
            if isinstance(out.error, BrokenPipeError):
                return 0 if status == 1 else status  # 1 is a verdict: it counts only if it is read
            if out.error:
                raise DataError(f"standard output cannot be written: {out.error.strerror}")
            return status
        except (UserError, *mistakes) as e:
            line = str(e)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except (OSError, RuntimeError, MemoryError) as e:  # many are RuntimeErrors in torch
            line = first_line(e)
            if advice := cure(e):
                line += f": {advice}"
            elif not isinstance(e, OSError):
                raise  # a bug in the program: show its stack
        print(f"error: {escaped(line)}", file=sys.stderr)
        return 2
