"""The search page: real requests to a real process, and a real browser where one is installed."""
import contextlib
import html
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import time
from urllib.parse import quote

import av
import pytest
import torch
from conftest import BROWSER, forked, noise_video, refused, status_of
from torchvision.io import decode_image
from videos import numbered, numbers, write_video

import search

NAMES = ["film.mp4", "late.webm", "<b>&\"'.mp4", "caf\u00e9 #1?.mp4", os.fsdecode(b"\xe9.mp4")]


class Site:
    """A process that serves the page of a folder."""

    def __init__(self, folder, ckpt, *words):
        self.log = folder / "log"
        self.log.touch()
        words += "--videos", folder / "videos", "--ckpt", ckpt, "--workers", 0, "--device", "cpu"
        self.pid = forked("--serve", 0, *words, log=self.log)
        port = r"at http://\S+:(\d+)"
        self.until(lambda: re.search(port, self.said))
        self.port = int(re.search(port, self.said)[1])

    @property
    def said(self):
        return self.log.read_text(encoding="utf-8")

    def ask(self, path, method="GET", **headers):
        """-> (status, headers, body)"""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

    def page(self, path):
        status, headers, body = self.ask(path)
        assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
        return body.decode()

    def cards(self, query="a"):
        """-> {name as a person sees it: the card's HTML}"""
        cards = re.findall('<li class="card">.*?</li>', self.page(f"/?q={query}"), re.S)
        return {html.unescape(re.search(r"<h2>\d+\. (.*?)<", card)[1]): card for card in cards}

    def until(self, true):
        deadline = time.monotonic() + 60
        while not true():
            assert time.monotonic() < deadline, self.said
            time.sleep(0.1)

    def end(self):
        """Press Ctrl-C. -> exit status"""
        os.kill(self.pid, signal.SIGINT)
        status = status_of(self.pid)
        assert "Traceback" not in self.said
        return status


def links(card, kind):
    return [html.unescape(link) for link in re.findall(f'src="(/{kind}/.*?)"', card)]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two films of four pieces, which browsers can play, one of which begins at 100 s; short clips
    with hostile names; an upright one.
    """
    videos = tmp_path_factory.mktemp("site") / "videos"
    videos.mkdir()
    write_video(videos / "film.mp4", numbered(160), fps=4, codec="libvpx-vp9", g=8)
    later = dict(output_ts_offset="100")
    with (
        av.open(videos / "film.mp4") as film,
        av.open(videos / "late.webm", "w", options=later) as late,
    ):
        stream = late.add_stream_from_template(film.streams.video[0])
        for packet in film.demux(video=0):
            if packet.size:
                packet.stream = stream
                late.mux(packet)
    for v, name in enumerate(NAMES[2:]):
        noise_video(videos / name, v)
    write_video(videos / "phone.mp4", torch.full((6, 64, 36, 3), 99, dtype=torch.uint8))
    (videos.parent / "secret.mp4").write_bytes((videos / "film.mp4").read_bytes())
    (videos / "notes.txt").write_text("secret")
    (videos / "bad.mp4").write_text("secret")
    return videos


@pytest.fixture(scope="module")
def site(ckpt, videos):
    site = Site(videos.parent, ckpt, "--host", "LocalHost", "--top", 9)
    site.until(lambda: "Videos: 6" in site.page("/"))
    yield site
    assert site.end() == 0


def test_the_page_and_its_results(site):
    empty = site.page("/")
    assert "Videos: 6, pieces: 12" in empty and 'href="/?q=a+dog' in empty
    assert "<video" not in empty and "<script" not in empty
    text = site.page(f"/?q={quote('<i>a dog</i> & “more”')}")
    assert "<i>" not in text and 'value="&lt;i&gt;a dog&lt;/i&gt; &amp; “more”"' in text
    odd = "می\u200cخواهم"  # what joins letters is sent again as it was typed
    assert f'value="{odd}"' in site.page(f"/?q={quote(odd)}")
    cards = site.cards()
    assert sorted(cards) == sorted([*NAMES[:-1], "\\udce9.mp4", "phone.mp4"])
    for name, card in cards.items():
        [nearest] = re.findall(r'class="nearest" src="(.*?)"', card)
        at = float(re.search(r"at=([\d.]+)", nearest)[1])
        moment = float(links(card, "video")[0].partition("#t=")[2])
        assert moment == pytest.approx(at + 100 * (name == "late.webm") + 0.004, abs=0.001)
        assert f'poster="{nearest}"' in card and len(links(card, "frame")) == 4


def test_videos_and_parts_of_them(site, videos):
    number = links(site.cards()["film.mp4"], "video")[0].partition("#")[0]
    body = (videos / "film.mp4").read_bytes()
    n = len(body)
    for asked, first, last in (
        ("0-", 0, n - 1), ("5-99", 5, 99), ("-7", n - 7, n - 1), (f"-{10 * n}", 0, n - 1),
    ):
        status, headers, sent = site.ask(number, Range=f"bytes={asked}")
        assert (status, sent) == (206, body[first:last + 1]), asked
        assert headers["Content-Range"] == f"bytes {first}-{last}/{n}"
    for asked in (f"{n}-", "-0", "9-3"):
        status, headers, sent = site.ask(number, Range=f"bytes={asked}")
        assert (status, headers["Content-Range"], sent) == (416, f"bytes */{n}", b"")
    for asked in ("", "bytes=a-", "bytes=-", "bytes=0-1,4-5", "frames=0-1", "bytes=" + "9" * 5000):
        status, headers, sent = site.ask(number, Range=asked)
        assert (status, headers["Content-Type"], sent) == (200, "video/mp4", body)


@pytest.mark.parametrize("name", ["film.mp4", "late.webm"])
def test_frames(site, name):
    for link in links(site.cards()[name], "frame"):
        status, headers, body = site.ask(link)
        assert status == 200 and headers["Content-Type"] == "image/jpeg"
        picture = decode_image(torch.frombuffer(bytearray(body), dtype=torch.uint8))
        at = float(re.search("at=([0-9.]+)", link)[1])
        assert numbers(picture[None]) == [round(4 * at)]
    for values in ("", "?at=", "?at=x", "?at=nan", "?at=inf", "?at=1e9", "?at=1&start=nan"):
        assert site.ask(link.split("?")[0] + values)[0] == 404, values


def test_nothing_else_is_let_out(site, videos):
    for path in ("/video/99", "/video/-1", "/video/", "/frame/99?at=0",
                 "/film.mp4", "/video/film.mp4", "/../secret.mp4", "/video/../../secret.mp4",
                 "/video/%2e%2e%2fsecret.mp4", f"/video/{videos.parent}/secret.mp4", "/notes.txt",
                 "/video/٣", "/favicon.ico"):
        status, _, body = site.ask(quote(path, safe="/?=%&"))
        assert status == 404 and b"secret" not in body.lower(), path
    # A path is a text to search for, and no picture or video of this machine.
    assert len(site.cards(quote(str(videos.parent / "secret.mp4")))) == 6
    for method in ("POST", "PUT"):
        status, headers, _ = site.ask("/", method)
        assert status == 405 and headers["Allow"] == "GET, HEAD"
    for path in ("/", "/nowhere"):
        headers = site.ask(path, "HEAD")[1]
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "script" not in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"


@pytest.mark.parametrize("status, names", [
    # Behind Docker or a forwarded port, the address is not the socket's own.
    (200, ["127.0.0.1", "localhost:8000", "LOCALHOST", "192.168.1.5:8000", "[::1]:80"]),
    (403, ["evil.example", "127.0.0.1.evil.example:80", "localhost.", "", "a@evil", "0", "1.2"]),
])
def test_names_of_the_page(site, status, names):
    for name in names:
        assert site.ask("/video/0", Host=name)[0] == status, name


def test_clients_end_nothing(site):
    """Nonsense, half a request, and those that go away in the middle of a film or a picture."""
    requests = ["nonsense\r\n\r\n", "GET / HT", "GET http://[ HTTP/1.1\r\n\r\n"]
    requests.append("GET / HTTP/1.1\r\nHost: [\r\n\r\n")
    for path in ("video/0", *(f"frame/0?at=1&end={k}" for k in range(5))):
        requests.append(f"GET /{path} HTTP/1.1\r\nHost: localhost\r\n\r\n")
    for request in requests:
        with socket.create_connection(("127.0.0.1", site.port)) as client:
            client.sendall(request.encode())
    assert "Videos: 6" in site.page("/")


def test_it_keeps_itself_up_to_date(ckpt, tmp_path):
    """New files come, lost ones go at once; what is shown keeps its number; Ctrl-C is the end."""
    videos = tmp_path / "videos"
    videos.mkdir()
    for v in range(2):
        noise_video(videos / f"{v}.mp4", v)
    site = Site(tmp_path, ckpt, "--every", 0.01)
    before = {name: links(card, "video")[0].split("#")[0] for name, card in site.cards().items()}
    [picture, *_] = links(site.cards()["1.mp4"], "frame")
    shown = site.ask(picture)[2]
    noise_video(videos / "1.mp4", 5)  # another film of this name
    noise_video(videos / "-1.mp4", 3)
    (videos / "0.mp4").unlink()
    site.until(lambda: set(site.cards()) == {"-1.mp4", "1.mp4"})
    assert before["1.mp4"] in site.cards()["1.mp4"]
    site.until(lambda: site.ask(picture)[2] != shown)
    assert site.ask(before["0.mp4"])[0] == 404
    videos.rename(tmp_path / "away")  # a disk that is away: said, and no end
    site.until(lambda: "searching what was there before" in site.said)
    (tmp_path / "away").rename(videos)
    site.until(lambda: "-1.mp4" in site.cards())
    assert site.end() == 0


def test_ctrl_c_while_videos_are_encoded_ends_the_page(ckpt, ask, tmp_path, monkeypatch):
    videos = tmp_path / "videos"
    videos.mkdir()
    noise_video(videos / "first.mp4", 0)
    ask("--update", "--videos", videos)
    for v in range(40):
        noise_video(videos / f"{v}.mp4", v)
    plain = av.open
    monkeypatch.setattr(av, "open", lambda *words, **how: time.sleep(0.1) or plain(*words, **how))
    site = Site(tmp_path, ckpt)
    assert [*site.cards()] == ["first.mp4"]
    assert site.end() == 0
    assert "stopped" in site.said


@pytest.mark.parametrize("words, word", [
    ("--serve {port}", "--host"),
    ("--serve 0 --host no.such.host.invalid", "no.such.host"),
])
def test_a_page_that_cannot_be_had(call, ckpt, site, videos, words, word):
    words = words.format(port=site.port).split()
    refused(call(search, "--videos", videos, "--ckpt", ckpt, *words), word)


# ---- a real browser ----

class Browser:
    """A headless Chromium with a page, by the DevTools protocol: JSON messages that end in NUL.

    It reads them from descriptor 3 and writes them to descriptor 4, so no port is opened.
    """

    def __init__(self, profile):
        pipes = 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null'
        options = ("--headless=new --no-sandbox --disable-gpu --hide-scrollbars --mute-audio "
                   "--no-first-run --disable-background-networking --remote-debugging-pipe")
        command = ["timeout", "90", "sh", "-c", pipes, "sh", BROWSER, *options.split()]
        command.append(f"--user-data-dir={profile}")
        self.job = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                    stderr=subprocess.DEVNULL)
        self.number = 0
        self.unread = b""
        self.session = {}

    def send(self, method, **params):
        """Send a command. -> its result."""
        self.number += 1
        message = dict(id=self.number, method=method, params=params, **self.session)
        self.job.stdin.write(json.dumps(message).encode() + b"\0")
        self.job.stdin.flush()
        answer = {}
        while answer.get("id") != self.number:  # what happens meanwhile is told too
            while b"\0" not in self.unread:
                part = self.job.stdout.read1(2 ** 16)
                assert part, "the browser has ended"
                self.unread += part
            message, _, self.unread = self.unread.partition(b"\0")
            answer = json.loads(message)
        return answer["result"]

    def value(self, expression):
        """What a JavaScript expression is on the page; None where it has no value."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        return answer["result"].get("value")

    def open(self, width, height, url):
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = dict(sessionId=attached["sessionId"])
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send("Emulation.setDeviceMetricsOverride", **size)
        self.send("Page.navigate", url=url)


@pytest.fixture
def browser(tmp_path):
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.send("Browser.close")
    browser.job.wait(20)


# What a video shows: the number of a frame of `numbered`.
SHOWN = """(() => {
    const context = document.createElement('canvas').getContext('2d');
    context.drawImage(VIDEO, 0, 0);
    const bits = [0, 1, 2, 3, 4, 5, 6, 7].map(
        k => (context.getImageData(8 * k + 4, 32, 1, 1).data[0] > 120) << k);
    return bits.reduce((a, b) => a + b)})()"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs a headless Chromium")
@pytest.mark.parametrize("width, height", [(1280, 900), (400, 800)])
def test_in_a_browser(site, browser, width, height):
    browser.open(width, height, f"http://127.0.0.1:{site.port}/?q=a")
    site.until(lambda: browser.value("document.readyState == 'complete'"))
    assert browser.value("document.documentElement.scrollWidth <= innerWidth")
    shapes = browser.value("""[...document.querySelectorAll('video')].map(x => {
        const box = x.getBoundingClientRect(), card = x.parentNode.getBoundingClientRect();
        return [box.top, box.height, card.bottom]})""")
    tops = [top for top, *_ in shapes]
    assert max(high for _, high, _ in shapes) <= 320
    if width == 1280:  # two rows, whose pictures are level
        assert tops == [tops[0]] * 3 + [tops[3]] * 3 and shapes[-1][2] <= height
    for name in ("film.mp4", "late.webm"):
        card = site.cards()[name]
        [link] = links(card, "video")
        at = float(re.search(r'poster=".*?at=([\d.]+)', card)[1])
        assert at > 1
        video = f"""document.querySelector('video[src="{link}"]')"""
        browser.value(f"{video}.preload = 'auto'")
        site.until(lambda: browser.value(f"{video}.readyState > 1 && !{video}.seeking"))
        assert browser.value(SHOWN.replace("VIDEO", video)) == round(4 * at)
