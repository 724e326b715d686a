"""The page of `search.py --serve`.

`SearchPage` is the server and keeps the index; `Handler` answers one request. The server gives
access to the files of the index, by number, and to no other file of this machine.
"""
import collections
import contextlib
import functools
import html
import ipaddress
import math
import mimetypes
import os
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlencode, urlsplit

from lib.common import DataError, clock
from lib.report import document, esc, moment, read_pictures, strip
from lib.video import Segment, start_time

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
header{display:flex;flex-wrap:wrap;align-items:center;gap:10px 24px}
h1{margin:0}
body:not(:has(.card)){display:grid;align-content:center;min-height:80vh}
body:not(:has(.card))>*{width:min(100%,48rem)}
form{display:flex;flex:1 1 20rem;gap:8px;max-width:46rem}
input,button{font:inherit;padding:9px 14px;border:1px solid var(--rule);border-radius:10px;
color:inherit;background:var(--card)}
input{flex:1;min-width:0}
button{cursor:pointer;font-weight:600}
:focus-visible{outline:3px solid var(--on);outline-offset:2px}
.card{padding:10px}
.card h2{font-size:1rem;line-height:1.35;margin:8px 0 0;overflow-wrap:anywhere}
.card p{margin:0}
video{display:block;width:100%;aspect-ratio:16/9;max-height:320px;margin-bottom:4px;
border-radius:8px;background:#000}
</style>"""
EXAMPLES = "a dog jumps into water", "two people dance", "a close-up of a face"


@functools.lru_cache(maxsize=10_000)
def start_of(path):
    """`start_time` of a file; 0.0 while it can't be read."""
    with contextlib.suppress(DataError):
        return start_time(path)
    return 0.0


def count_pieces(index):
    """Number of pieces of each file of an Index, up to the last file that has any. -> (n,)"""
    return index.file[index.file >= 0].bincount()


def span(hit, pieces):
    """The part of its file that a Hit covers, as text; "" for all of it. pieces: count_pieces."""
    if pieces[hit.file] == 1:
        return ""
    return f"   ({clock(hit.start)} to {clock(hit.end)})"


class SearchPage(ThreadingHTTPServer):
    """Serves the page at a host and port, with one thread per request."""

    def __init__(self, host, port):
        self.host = host.lower()  # as browsers name it
        self.index = None
        self.numbers = {}  # path: its number, which never changes while the server runs
        self.paths = {}    # number as str: path, for the files of the current index
        self.searching = threading.Lock()
        # For each piece, so that it is decoded only once, and a slow disk delays no other.
        self.decoding = collections.defaultdict(threading.Lock)
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

        try:
            show_saved()
            while True:
                try:
                    index = build(saved=show_saved)
                    if index.stopped:
                        return 0
                    self.show(index)
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
        for cached in (read_pictures, start_of):  # files may have been replaced
            cached.cache_clear()
        if first:
            threading.Thread(target=self.serve_forever, daemon=True).start()
            print(f"searching at http://{self.host}:{self.server_port} (Ctrl-C ends it)")
            if self.host not in ("127.0.0.1", "localhost"):
                print("anyone who can reach that address can search and watch these videos")
            sys.stdout.flush()

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
        # scripts could then read this page. It can't do so with an address.
        host = urlsplit(f"//{self.headers.get('Host')}").hostname
        if host not in ("localhost", self.server.host) and not is_address(host):
            self.send_error(403, "Unknown name", "Use an IP address instead of this name")
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
        about = f"Videos: {len(index.paths)}, pieces: {pieces.sum()}"
        cards = ""
        focus = ""
        if query:
            with self.server.searching:
                hits = self.server.search(query, index)
            about += ". The best first; scores are not probabilities."
            for rank, hit in enumerate(hits, 1):
                cards += self.card(rank, hit, index, pieces)
        else:
            focus = "autofocus"
            about += ". For example: "
            about += ", ".join(f'<a href="/?{urlencode(dict(q=x))}">{x}</a>' for x in EXAMPLES)
        typed = html.escape(query)  # not as esc shows it: it may be sent again
        body = f"""{STYLE}<header><h1><label for="q">Search videos</label></h1>
<form action="/" role="search">
<input id="q" name="q" type="search" required {focus} value="{typed}"
 placeholder="What do you want to see?"><button>Search</button></form></header>
<main><p class="soft">{about}</p><ol class="cards">{cards}</ol></main>"""
        text = document(title, body, POLICY)
        self.send_whole("text/html; charset=utf-8", text.encode("utf-8", "replace"))

    def card(self, rank, hit, index, pieces):
        """A Hit with its name, its frames, and a player that starts at its best frame. -> HTML"""
        path = index.paths[hit.file]
        number = self.server.numbers[path]
        # start and end are the same for all frames of a piece, so it is decoded only once.
        part = f"start={hit.start}&amp;end={hit.end}"
        frames = [f"/frame/{number}?at={at}&amp;{part}" for at in hit.times]
        nearest = hit.times.index(hit.at)
        video = f"/video/{number}{moment(start_of(path), hit.at)}"
        return f"""<li class="card">
<video controls preload="none" poster="{frames[nearest]}" src="{video}"></video>
{strip(hit.times, nearest, frames)}<h2>{rank}. {esc(index.names[hit.file])}</h2>
<p class="soft"><a href="{video}">at {clock(hit.at)}</a>{span(hit, pieces)},
score {hit.score:.4f}</p></li>"""

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
            if not math.isfinite(at + start + end):
                raise ValueError
            # An index rounds: a bound that was rounded up would come after its frame.
            segment = Segment(path, start - 0.004, end - 0.004)
            with self.server.decoding[segment]:
                times, jpegs = read_pictures(segment, self.server.frames, 240)
        except (KeyError, ValueError):  # no valid time, or no frame there
            return self.send_error(404)
        nearest = min(range(len(times)), key=lambda k: abs(times[k] - at))
        self.send_whole("image/jpeg", jpegs[nearest])


def is_address(host):
    """Whether a host is an IP address, not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def byte_range(first, last, size):
    """Byte positions from `first` to `last`, inclusive; without `first`, the last `last` bytes.

    first, last: digits or "", as in the header Range. -> range, empty if it starts beyond the end.
    """
    if not first:
        return range(max(0, size - int(last or size)), size)
    return range(int(first), min(size, int(last or size) + 1))
