"""Input and output of search.py: at a prompt, through a pipe, and on the page of `--serve`.

`SearchPage` is the server and keeps the index; `Handler` answers one request. The server gives
access to the files of the index, by number, and to no other file of this machine.
"""
import contextlib
import functools
import html
import json
import mimetypes
import os
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlencode, urlsplit

from lib.common import DataError, clock, escaped, write_output
from lib.page import document, esc, found_segment, images, jpeg, nearest_of, shrunk
from lib.report import write_search_report
from lib.video import read_segment

PAUSE = 30  # least seconds between updates of the page while videos are being encoded
POLICY = ("default-src 'none'; img-src 'self'; media-src 'self'; style-src 'unsafe-inline'; "
          "form-action 'self'; base-uri 'none'")
# Sent with every response: other sites can't embed or read the page, or learn what is searched.
HEADERS = {
    "Allow": "GET, HEAD",
    "Cache-Control": "no-cache",
    "Content-Security-Policy": f"{POLICY}; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
STYLE = """<style>
form{display:flex;flex-wrap:wrap;gap:10px;margin:1rem 0}
form label{flex-basis:100%}
input,button{font:inherit;padding:10px 14px;border:1px solid var(--soft);border-radius:10px;
color:inherit;background:var(--card)}
input{flex:1 1 12rem;min-width:0}
button{cursor:pointer;font-weight:600}
:focus-visible{outline:3px solid var(--on);outline-offset:2px}
a{color:var(--on)}
video{width:100%;max-height:60vh;margin-top:8px;border-radius:8px;background:#000}
</style>"""


# ---- at a prompt, through a pipe ----

def questions(args, job):
    """Yield lists of queries: from the command line, else one by one from a prompt or a pipe."""
    if args.query:
        yield args.query
        return
    sys.stdin.reconfigure(errors="replace")
    terminal = sys.stdin.isatty()
    asked = False
    line = ""
    while line is not None:
        if line.strip():
            asked = True
            yield [line.strip()]
        line = None
        # Stop if the reader of the results has gone (| head) and no file is to be written.
        unread = getattr(sys.stdout, "error", None) and not (args.json or args.report)
        if job.rank == 0 and not unread:
            # Standard output may be a file, which is for results.
            out = sys.stdout if sys.stdout.isatty() else sys.stderr
            with contextlib.suppress(EOFError), contextlib.redirect_stdout(out):
                line = input("query> " if terminal else "")
        line = job.gather(line)[0]
    if not asked and not terminal:
        raise DataError(
            'no query: say what to look for, as in search.py "a dog jumps" --videos DIR, or give '
            "one query per line on standard input"
        )


def count_pieces(index):
    """Number of pieces of each file of an Index, up to the last file that has any. -> (n,)"""
    return index.file[index.file >= 0].bincount()


def span(hit, pieces):
    """The part of its file that a Hit covers, as text; "" for all of it. pieces: count_pieces."""
    if pieces[hit.file] == 1:
        return ""
    return f"   ({clock(hit.start)} to {clock(hit.end)})"


def table(query, hits, index):
    """A query's results as a table for the terminal. -> str"""
    lines = [f"\n{escaped(query)}", " rank   score  at       file"]
    pieces = count_pieces(index)
    for rank, hit in enumerate(hits, 1):
        name = escaped(index.names[hit.file]) + span(hit, pieces)
        lines.append(f"{rank:5d} {hit.score:7.4f}  {clock(hit.at)}  {name}")
    return "\n".join(lines)


def print_files(names, end):
    """Print only file names: escaped on a terminal, and elsewhere the exact bytes of the names."""
    if sys.stdout.isatty() and end == "\n":
        names = map(escaped, names)
    else:
        errors = sys.getfilesystemencodeerrors()
        sys.stdout.reconfigure(encoding=sys.getfilesystemencoding(), errors=errors)
    print(*names, sep=end, end=end, flush=True)


def write_results(model, found, args):
    """Write the files of --json and --report."""
    if args.json == "-":
        print(json.dumps(found, indent=1), flush=True)
    elif args.json:
        write_output("--json", args.json, json.dumps(found, indent=1))
    if args.report:
        names = "ckpt", "window", "shortlist", "trials", "expected", "seed"
        settings = {name: getattr(args, name) for name in names}
        settings.update(model.config, prior=model.prior, prior_std=model.prior_std)
        settings["videos"] = " ".join(args.videos)
        write_search_report(args.report, found, settings)
        print(f"report: {args.report}", file=sys.stderr)


# ---- the page ----

class SearchPage(ThreadingHTTPServer):
    """Serves the page at a host and port, with one thread per request."""

    def __init__(self, host, port):
        self.host = host.lower()  # as browsers name it
        self.index = None
        self.numbers = {}  # path: its number, which never changes while the server runs
        self.paths = {}    # number as str: path, for the files of the current index
        # Separate locks, so that frames can be decoded while the model is searching.
        self.searching = threading.Lock()
        self.decoding = threading.Lock()
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            raise DataError(f"--serve {port}: can't listen at {host} ({error.strerror}): give "
                            "another port or --host") from None

    def run(self, build, search, frames, every):
        """Serve until Ctrl-C. The existing index can be searched at once, new videos once saved.

        build: build_index with its model and paths. search(query, Index) -> list of Hit; calls
        never overlap. frames: T of a piece. every: minutes between looks for new files; None: look
        once.
        """
        self.search = search
        self.frames = frames
        self.due = 0

        def show_saved():
            # Opening a large index takes seconds, and encoding waits for it.
            if time.monotonic() > self.due:
                with contextlib.suppress(DataError):  # the index is still empty
                    self.show(build(new=False))
                self.due = time.monotonic() + PAUSE

        show_saved()
        try:
            while True:
                try:
                    self.show(build(saved=show_saved))
                except DataError as error:
                    if self.index is None:
                        raise
                    print(f"{error}; searching what was there before", flush=True)
                threading.Event().wait(60 * every if every else None)
        except KeyboardInterrupt:
            return 0

    def show(self, index):
        """Search this Index from now on. The first call starts the server."""
        for path in index.paths:
            self.numbers.setdefault(path, len(self.numbers))
        self.paths = {str(self.numbers[path]): path for path in index.paths}
        first = self.index is None
        self.index = index
        self.pictures.cache_clear()  # files may have been replaced
        if first:
            threading.Thread(target=self.serve_forever, daemon=True).start()
            print(f"searching at http://{self.host}:{self.server_port} (Ctrl-C ends it)")
            if self.host not in ("127.0.0.1", "localhost"):
                print("anyone who can reach that address can search and watch these videos")
            sys.stdout.flush()

    @functools.lru_cache(maxsize=200)
    def pictures(self, path, start, end):
        """The sampled frames of a piece. -> (their times, their JPEGs)"""
        piece = read_segment(found_segment(path, start, end), self.frames)
        return piece.times, [jpeg(shrunk(frame, 240)) for frame in piece.frames]

    def handle_error(self, request, address):
        """Ignore clients that disconnect or send malformed requests. Print all other errors."""
        if not isinstance(sys.exc_info()[1], (OSError, ValueError)):
            super().handle_error(request, address)


class Handler(BaseHTTPRequestHandler):
    """Answers a request.

    - `/` is the search box, and `/?q=TEXT` also shows the results.
    - `/video/NUMBER` is a file of the index.
    - `/frame/NUMBER?at=S` is its frame at S seconds. With `&start=S&end=S` it is the nearest of
      the frames sampled from that piece.
    """

    timeout = 60  # seconds after which the connection of a silent client is closed

    def do_GET(self):
        # Files are requested by number: no path in a request is ever opened.
        url = urlsplit(self.path)
        values = dict(parse_qsl(url.query))
        kind, _, number = url.path[1:].partition("/")
        send = {"video": self.send_video, "frame": self.send_frame}.get(kind)
        path = self.server.paths.get(number, "")
        # Against DNS rebinding: a site could point its own host name at this server, and its
        # scripts could then read this page.
        host = urlsplit(f"//{self.headers.get('Host')}").hostname
        if host not in ("localhost", self.server.host, self.connection.getsockname()[0]):
            self.send_error(403, "Unknown name", "Start the page with --host and this name")
        elif url.path == "/":
            self.send_page(values.get("q", "").strip())
        elif send and os.path.isfile(path):
            send(path, values)
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def do_POST(self):
        self.send_error(405)

    do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_POST

    def log_message(self, *unused):
        """Log nothing, because queries are private."""

    def end_headers(self):
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def start(self, status, kind, length, part=None):
        """Send the status and headers. part: range of bytes for Content-Range, as "0-99/1000"."""
        self.send_response(status)
        # Browsers need the length to seek in a video.
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", length)
        if part:
            self.send_header("Content-Range", f"bytes {part}")
        self.end_headers()

    def send_whole(self, kind, body):
        self.start(200, kind, len(body))
        if self.command == "GET":
            self.wfile.write(body)

    def send_page(self, query):
        """Send the search box, and the results of a query if there is one."""
        index = self.server.index
        title = f"{query} - T-MASS" if query else "T-MASS: search videos"
        pieces = count_pieces(index)
        found = f"{len(index.paths)} videos, {pieces.sum()} pieces"
        cards = ""
        focus = "autofocus"
        if query:
            with self.server.searching:
                hits = self.server.search(query, index)
            found = f"The best {len(hits)} of {found}; scores are not probabilities"
            focus = ""
            for rank, hit in enumerate(hits, 1):
                cards += self.card(rank, hit, index, pieces)
        typed = html.escape(query)  # not as esc shows it: it may be sent again
        body = f"""{STYLE}<header><h1><a href="/">Search videos</a></h1></header><main>
<form action="/" role="search"><label for="q">What do you want to see?</label>
<input id="q" name="q" type="search" required {focus} value="{typed}">
<button>Search</button></form><p class="soft">{found}</p>
<ol class="cards">{cards}</ol></main>"""
        text = document(title, body, POLICY)
        self.send_whole("text/html; charset=utf-8", text.encode("utf-8", "replace"))

    def card(self, rank, hit, index, pieces):
        """A Hit with its name, its frames, and a player that starts at its best frame. -> HTML"""
        number = self.server.numbers[index.paths[hit.file]]

        # start and end are the same for all frames of a piece, so it is decoded only once.
        def picture(at):
            values = urlencode(dict(at=at, start=hit.start, end=hit.end))
            return esc(f"/frame/{number}?{values}")

        def attributes(k):
            return f'src="{picture(hit.times[k])}" loading="lazy"'

        video = f"/video/{number}#t={hit.at:g}"
        return f"""<li class="card"><h2>{rank}. {esc(index.names[hit.file])}</h2>
<p class="soft"><a href="{video}">at {clock(hit.at)}</a>{span(hit, pieces)},
score {hit.score:.4f}</p>{images(hit.times, hit.at, attributes)}
<video controls preload="none" poster="{picture(hit.at)}" src="{video}"></video></li>"""

    def send_video(self, path, values):
        """Send a file, or the requested range of its bytes, which browsers need for seeking."""
        kind = mimetypes.guess_type(path)[0] or "video/mp4"
        asked = self.headers.get("Range", "")
        asked = re.fullmatch("bytes=(?!-$)([0-9]{0,18})-([0-9]{0,18})", asked)
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            part = byte_range(*asked.groups(), size) if asked else range(size)
            if not asked:
                self.start(200, kind, size)
            elif part:
                self.start(206, kind, len(part), f"{part.start}-{part.stop - 1}/{size}")
            else:
                self.start(416, kind, 0, f"*/{size}")
            if part and self.command == "GET":
                self.connection.sendfile(file, part.start, len(part))

    def send_frame(self, path, values):
        try:
            names = "at", "start", "end"
            at, start, end = (float(values.get(name, values["at"])) for name in names)
            with self.server.decoding:
                times, pictures = self.server.pictures(path, start, end)
        except (KeyError, ValueError):  # no valid time, or no frame there
            return self.send_error(404)
        self.send_whole("image/jpeg", pictures[nearest_of(times, at)])


def byte_range(first, last, size):
    """Byte positions from `first` to `last`, inclusive; without `first`, the last `last` bytes.

    first, last: digits or "", as in the header Range. -> range, empty if it starts beyond the end.
    """
    if not first:
        return range(max(0, size - int(last or size)), size)
    return range(int(first), min(size, int(last or size) + 1))
