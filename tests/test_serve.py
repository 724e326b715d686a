"""The search page: real requests to a real process, and a real browser where one is installed."""
import contextlib
import html
import http.client
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from urllib.parse import quote

import pytest
from conftest import ROOT
from PIL import Image
from test_eval import ENV, folder, noise_video  # noqa: F401
from test_search import ask  # noqa: F401
from videos import numbered, write_video

from lib.serve import byte_range

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class Site:
    """A process that serves the page of a folder."""

    def __init__(self, videos, ckpt, *options):
        command = [sys.executable, str(ROOT / "search.py"), "--videos", str(videos), "--serve", "0"]
        command += ["--ckpt", str(ckpt), "--workers", "0", "--device", "cpu", *map(str, options)]
        self.job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                    text=True, env={**os.environ, **ENV})
        self.timer = threading.Timer(120, self.job.kill)  # nothing waits for it for ever
        self.timer.start()
        self.lines = []
        self.host, self.port = re.search(r"at http://(.*):(\d+)", self.until("searching")).groups()
        threading.Thread(target=self.listen, daemon=True).start()

    def until(self, word):
        for line in self.job.stderr:
            self.lines.append(line)
            if word in line:
                return line
        raise AssertionError("".join(self.lines))

    def listen(self):
        self.lines += self.job.stderr

    def ask(self, path, method="GET", body=None, **headers):
        """-> (status, headers, body)"""
        connection = http.client.HTTPConnection("127.0.0.1", int(self.port), timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path, body=body, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

    def page(self, path):
        status, headers, body = self.ask(path)
        assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
        return body.decode()

    def end(self, number=signal.SIGINT):
        """-> (exit status, what it said)"""
        self.job.send_signal(number)
        status = self.job.wait(20)
        self.timer.cancel()
        return status, "".join(self.lines)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A film of four pieces, and short videos with hostile names."""
    videos = tmp_path_factory.mktemp("site") / "videos"
    videos.mkdir()
    write_video(videos / "film.mp4", numbered(160), fps=4, g=8)
    for v, name in enumerate(["<b>&\"'.mp4", "caf\u00e9 #1?.mp4", os.fsdecode(b"\xe9.mp4")]):
        noise_video(videos / name, v)
    (videos.parent / "secret.mp4").write_bytes((videos / "film.mp4").read_bytes())
    (videos / "notes.txt").write_text("secret")
    (videos / "bad.mp4").write_text("secret")
    return videos


@pytest.fixture(scope="module")
def site(folder, videos):  # noqa: F811
    site = Site(videos, folder / "model.pt")
    yield site
    if site.job.poll() is None:
        status, said = site.end()
        assert status == 0 and "Traceback" not in said


def cards(text):
    """-> {name as a person sees it: the card's HTML}"""
    found = re.findall(r'<li class="card"><h2>\d+\. (.*?)</h2>(.*?)</li>', text, re.S)
    return {html.unescape(name): card for name, card in found}


def links(text, kind):
    return [html.unescape(link) for link in re.findall(f'src="(/{kind}/.*?)"', text)]


def test_the_page_and_its_results(site):
    empty = site.page("/")
    assert '<form action="/"' in empty and '<label for="q">' in empty and "autofocus" in empty
    assert "4 videos, 7 pieces" in empty and "<video" not in empty and "<script" not in empty
    text = site.page(f"/?q={quote('<i>a dog</i> & “more”')}")
    assert "<i>" not in text and 'value="&lt;i&gt;a dog&lt;/i&gt; &amp; “more”"' in text
    found = cards(text)
    assert sorted(found) == sorted(["film.mp4", "<b>&\"'.mp4", "caf\u00e9 #1?.mp4", "\\udce9.mp4"])
    for name, card in found.items():
        (video,) = links(card, "video")
        at = float(re.fullmatch(r"/video/\d+#t=(.*)", video)[1])
        frames = links(card, "frame")
        (nearest,) = re.findall(r'class="nearest" src="(.*?)"', card)
        assert f"at={at:g}" in html.unescape(nearest) and len(frames) == 4
        assert all(re.search('alt="at 0:00:\\d\\d"', image) for image in card.split("<img")[1:])
        assert ("to 0:" in card) == (name == "film.mp4")


def test_videos_and_parts_of_them(site, videos):
    number = links(cards(site.page("/?q=a"))["film.mp4"], "video")[0].partition("#")[0]
    body = (videos / "film.mp4").read_bytes()
    n = len(body)
    status, headers, whole = site.ask(number)
    assert (status, whole) == (200, body) and headers["Content-Type"] == "video/mp4"
    for asked, first, last in (("0-", 0, n - 1), ("0-0", 0, 0), ("5-99", 5, 99),
                               (f"{n - 1}-", n - 1, n - 1), ("-7", n - 7, n - 1),
                               (f"3-{10 * n}", 3, n - 1), (f"-{10 * n}", 0, n - 1)):
        for method in ("GET", "HEAD"):
            status, headers, part = site.ask(number, method, Range=f"bytes={asked}")
            assert status == 206 and headers["Content-Range"] == f"bytes {first}-{last}/{n}"
            assert headers["Content-Length"] == str(last + 1 - first)
            assert part == (body[first:last + 1] if method == "GET" else b"")
    for asked in (f"{n}-", f"{n + 9}-{n + 10}", "-0", "9-3"):
        status, headers, part = site.ask(number, Range=f"bytes={asked}")
        assert (status, headers["Content-Range"], part) == (416, f"bytes */{n}", b"")
    for asked in ("bytes=a-", "bytes=0-1,4-5", "frames=0-1", "bytes=" + "9" * 5000 + "-"):
        assert site.ask(number, Range=asked)[::2] == (200, body)
    assert byte_range("0", "5", 0) == byte_range("", "5", 0) == range(0)


def test_frames(site):
    card = cards(site.page("/?q=a"))["film.mp4"]
    times = []
    for link in links(card, "frame"):
        status, headers, body = site.ask(link)
        assert status == 200 and headers["Content-Type"] == "image/jpeg"
        picture = Image.open(io.BytesIO(body)).convert("L")
        width, height = picture.size
        columns = [picture.getpixel((int((k + .5) * width / 8), height // 2)) for k in range(8)]
        shown = sum(2 ** k for k, value in enumerate(columns) if value > 120)
        times.append(float(re.search("at=([0-9.]+)", link)[1]))
        assert shown == round(4 * times[-1])
    assert times == sorted(times) and height == 240
    number = link.split("?")[0]
    for values in ("", "?at=", "?at=x", "?at=1e9", "?at=1&start=inf", "?at=-1&end=b"):
        assert site.ask(number + values)[0] == 404


def test_nothing_else_is_let_out(site, videos):
    for path in ("/video/99", "/video/-1", "/video/0x1", "/video/", "/video", "/frame/99?at=0",
                 "/film.mp4", "/video/film.mp4", "/../secret.mp4", "/video/../../secret.mp4",
                 "/video/%2e%2e%2fsecret.mp4", f"/video/{videos.parent}/secret.mp4", "/notes.txt",
                 "/video/٣", "/favicon.ico", "/video/" + "1" * 5000, "/?q=a/../video"):
        status, _, body = site.ask(quote(path, safe="/?=%&"))
        assert status == (200 if "?q=" in path else 404) and b"secret" not in body.lower(), path
    # A path is a text to search for, and no picture or video of this machine.
    text = site.page("/?q=" + quote(str(videos.parent / "secret.mp4")))
    assert text.count("<video") == 4
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        status, headers, _ = site.ask("/", method, body=b"x" * 10)
        assert status == 405 and headers["Allow"] == "GET, HEAD"
    for path in ("/", "/video/0", "/nowhere"):
        headers = site.ask(path, "HEAD")[1]
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "script" not in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"


def test_other_names_are_refused(site):
    port = site.port
    for name in ("127.0.0.1", f"127.0.0.1:{port}", f"localhost:{port}", "LOCALHOST"):
        assert site.ask("/", Host=name)[0] == 200
    for name in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "localhost.",
                 "", "a@evil", "0", "10.0.0.1"):
        for path in ("/", "/?q=a", "/video/0", "/frame/0?at=0"):
            assert site.ask(path, Host=name)[0] == 403


def raw(site, text):
    with socket.create_connection(("127.0.0.1", int(site.port)), timeout=30) as connection:
        connection.sendall(text)
        connection.shutdown(socket.SHUT_WR)
        with connection.makefile("rb") as answer:
            return answer.read()


def test_clients_end_nothing(site):
    """Nonsense, half a request, and those that go away in the middle of a film."""
    assert b"Error" in raw(site, b"nonsense\r\n\r\n")
    assert raw(site, b"GET http://[ HTTP/1.1\r\nHost: localhost\r\n\r\n") == b""
    assert raw(site, b"GET / HTTP/1.1\r\nHost: [\r\n\r\n") == b""
    waiting = socket.create_connection(("127.0.0.1", int(site.port)))
    waiting.sendall(b"GET / HT")
    for _ in range(20):
        raw(site, b"GET /video/0 HTTP/1.1\r\nHost: localhost\r\n\r\n")
    threads = [threading.Thread(target=site.page, args=(f"/?q=dog{k}",)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert "4 videos" in site.page("/") and site.job.poll() is None
    waiting.close()
    assert "Traceback" not in "".join(site.lines)


def test_it_keeps_itself_up_to_date(folder, tmp_path):  # noqa: F811
    """New files come, lost ones go at once; what is shown keeps its number; Ctrl-C is the end."""
    for v in range(2):
        noise_video(tmp_path / f"{v}.mp4", v)
    site = Site(tmp_path, folder / "model.pt", "--every", 0.01)
    try:
        before = {name: links(card, "video")[0] for name, card in cards(site.page("/?q=a")).items()}
        noise_video(tmp_path / "-1.mp4", 3)
        (tmp_path / "0.mp4").unlink()
        assert set(cards(site.page("/?q=a"))) in ({"1.mp4"}, {"-1.mp4", "1.mp4"})
        deadline = time.monotonic() + 30
        while "-1.mp4" not in (found := cards(site.page("/?q=a"))):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert sorted(found) == ["-1.mp4", "1.mp4"]
        assert links(found["1.mp4"], "video")[0] == before["1.mp4"]
        assert site.ask(before["0.mp4"].split("#")[0])[0] == 404
        tmp_path.rename(tmp_path.parent / "away")  # a disk that is away: said, and no end
        site.ask("/")
        while "searching what was there before" not in "".join(site.lines):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        (tmp_path.parent / "away").rename(tmp_path)
        while "-1.mp4" not in cards(site.page("/?q=a")):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        status, said = site.end()
    assert status == 0 and "Traceback" not in said
    assert f"http://127.0.0.1:{site.port}" in said and "whoever" not in said


def test_a_page_that_cannot_be_had(ask, folder, site):  # noqa: F811
    for more, *words in ((["--serve", site.port], site.port, "--host"),
                         (["--serve", 0, "--host", "no.such.host.invalid"], "no.such.host"),
                         (["--serve", "a dog"], "a dog"), (["a dog", "--serve"], "no query"),
                         (["a dog", "--update"], "no query")):
        err = ask(*more, "--videos", folder / "videos", expect=2)[1]
        assert all(word in err.splitlines()[-1] for word in words), err


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="needs a headless Chromium")
def test_in_a_browser(site, tmp_path):
    """A browser shows the results, and a film plays from its moment."""
    browser = next(filter(shutil.which, BROWSERS))
    video = links(cards(site.page("/?q=a"))["film.mp4"], "video")[0]
    for name, path in (("results", "/?q=a"), ("video", video)):
        picture = tmp_path / f"{name}.png"
        subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu",
                        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=400,900",
                        f"--screenshot={picture}", f"http://127.0.0.1:{site.port}{path}"],
                       check=True, timeout=60, capture_output=True)
        colours = Image.open(picture).convert("L").getcolors(256)
        assert len(colours) > 20
