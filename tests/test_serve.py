"""The search page: real requests to a real process, and a real browser where one is installed."""
import base64
import contextlib
import html
import http.client
import io
import json
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
import torch
from before import ENV, folder, noise_video  # noqa: F401
from conftest import ROOT
from PIL import Image

from videos import numbered, write_video

from lib import serve
from lib.serve import byte_range
from search import Index

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
    """A film of four pieces, which any browser can play, and short videos with hostile names."""
    videos = tmp_path_factory.mktemp("site") / "videos"
    videos.mkdir()
    write_video(videos / "film.mp4", numbered(160), fps=4, codec="libvpx-vp9", g=8)
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
    odd = "می\u200cخواهم 👩\u200d🎤"  # what joins and parts letters is sent again as it was typed
    assert f'value="{odd}"' in site.page(f"/?q={quote(odd)}")
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
    huge = "bytes=" + "9" * 5000 + "-"
    for asked in ("bytes=a-", "bytes=-", "bytes=0-1,4-5", "frames=0-1", huge):
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
    assert serve.SearchPage("LocalHost", 0).host == "localhost"  # as browsers send it
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
        picture = links(cards(site.page("/?q=a"))["1.mp4"], "frame")[0]
        shown = site.ask(picture)[2]
        noise_video(tmp_path / "1.mp4", 5)  # another film of this name
        noise_video(tmp_path / "-1.mp4", 3)
        (tmp_path / "0.mp4").unlink()
        assert set(cards(site.page("/?q=a"))) in ({"1.mp4"}, {"-1.mp4", "1.mp4"})
        deadline = time.monotonic() + 30
        while "-1.mp4" not in (found := cards(site.page("/?q=a"))):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert sorted(found) == ["-1.mp4", "1.mp4"]
        number = before["1.mp4"].split("#")[0]
        assert links(found["1.mp4"], "video")[0].split("#")[0] == number
        assert site.ask(picture)[2] != shown
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


@pytest.mark.parametrize("pause, expected", [(30, 1), (0, 51)])
def test_what_is_saved_is_not_looked_at_all_the_time(monkeypatch, pause, expected):
    monkeypatch.setattr(serve, "PAUSE", pause)
    page = serve.SearchPage("127.0.0.1", 0)
    nothing = torch.zeros(0, dtype=torch.int64)
    looks = []

    def build(new=True, saved=None):
        if not new:
            looks.append(time.monotonic())
            return Index([], nothing, nothing, [], [])
        for _ in range(50):
            saved()
        raise KeyboardInterrupt
    try:
        assert page.run(build, None, 4, None) == 0 and len(looks) == expected
    finally:
        page.shutdown()
        page.server_close()


def test_a_page_that_cannot_be_had(ask, folder, site):  # noqa: F811
    for more, *words in ((["--serve", site.port], site.port, "--host"),
                         (["--serve", 0, "--host", "no.such.host.invalid"], "no.such.host"),
                         (["--serve", "a dog"], "a dog"), (["a dog", "--serve"], "no query"),
                         (["a dog", "--update"], "no query")):
        err = ask(*more, "--videos", folder / "videos", expect=2)[1]
        assert all(word in err.splitlines()[-1] for word in words), err


# ---- a real browser ----

class Browser:
    """A headless Chromium with a page, by the DevTools protocol: JSON messages that end in NUL.

    It reads them from descriptor 3 and writes them to descriptor 4, so no port is opened.
    """

    def __init__(self, profile):
        program = next(filter(shutil.which, BROWSERS))
        pipes = 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null'
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                   "--mute-audio", "--no-first-run", "--disable-background-networking",
                   "--remote-debugging-pipe"]
        command = ["sh", "-c", pipes, "sh", program, *options, f"--user-data-dir={profile}"]
        self.job = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                    stderr=subprocess.DEVNULL, start_new_session=True)
        self.timer = threading.Timer(90, self.kill)  # then what waits for an answer fails
        self.timer.start()
        self.number = 0
        self.unread = b""
        self.session = {}

    def open_page(self):
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = dict(sessionId=attached["sessionId"])

    def kill(self):
        """End the browser and the processes that it started."""
        self.timer.cancel()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.job.pid, signal.SIGKILL)
        self.job.wait(20)

    def send(self, method, **params):
        """Send a command. -> its result. Raises RuntimeError."""
        self.number += 1
        message = dict(id=self.number, method=method, params=params, **self.session)
        self.job.stdin.write(json.dumps(message).encode() + b"\0")
        self.job.stdin.flush()
        while (answer := self.receive()).get("id") != self.number:
            pass  # what happens meanwhile is told too
        if "result" not in answer:
            raise RuntimeError(method, answer)
        return answer["result"]

    def receive(self):
        while b"\0" not in self.unread:
            part = self.job.stdout.read1(2 ** 16)
            assert part, "the browser has ended"
            self.unread += part
        message, _, self.unread = self.unread.partition(b"\0")
        return json.loads(message)

    def value(self, expression):
        """What a JavaScript expression is on the page."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(expression, answer)
        return answer["result"].get("value")

    def until(self, expression):
        """Wait until an expression is true."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with contextlib.suppress(RuntimeError):  # the page is not there yet
                if self.value(expression):
                    return
            time.sleep(0.05)
        raise AssertionError(expression)

    def press(self, key, code, text=""):
        common = dict(key=key, code=key, windowsVirtualKeyCode=code)
        self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.send("Input.dispatchKeyEvent", type="keyUp", **common)


@pytest.fixture
def browser(tmp_path):
    browser = Browser(tmp_path / "profile")
    try:
        browser.open_page()
        yield browser
    finally:
        browser.kill()


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="needs a headless Chromium")
@pytest.mark.parametrize("width, scripts", [(1280, True), (400, False)])
def test_in_a_browser(site, browser, tmp_path, width, scripts):
    """With the keyboard alone: a query, its results, and a film that plays from its moment."""
    size = dict(width=width, height=900, deviceScaleFactor=1, mobile=False)
    browser.send("Emulation.setDeviceMetricsOverride", **size)
    browser.send("Emulation.setScriptExecutionDisabled", value=not scripts)
    browser.send("Page.navigate", url=f"http://127.0.0.1:{site.port}/")
    browser.until("document.activeElement.id == 'q'")  # nothing is to be clicked first
    browser.send("Input.insertText", text="a dog & <b>more</b>")
    browser.press("Enter", 13, "\r")
    browser.until("document.querySelectorAll('.card video').length == 4")
    assert browser.value("document.querySelector('#q').value") == "a dog & <b>more</b>"
    card = "[...document.querySelectorAll('.card')].find(x => x.innerText.includes('film.mp4'))"
    video = f"{card}.querySelector('video')"
    browser.until("document.readyState == 'complete'")
    for _ in range(40):
        browser.press("Tab", 9)
        if browser.value(f"document.activeElement == {video}"):
            break
    # What has the focus can be seen, also in the pictures that are left for people.
    assert browser.value(f"document.activeElement == {video} && "
                         f"getComputedStyle({video}).outlineStyle == 'solid'")
    browser.until(f"{card}.querySelector('.nearest').naturalWidth")
    browser.press(" ", 32, " ")
    browser.until(f"{video}.played.length && {video}.currentTime > {video}.played.start(0) + 0.2")
    at = float(browser.value(f"{video}.getAttribute('src')").partition("#t=")[2])
    assert at > 1 and browser.value(f"{video}.played.start(0)") == pytest.approx(at, abs=0.3)
    assert browser.value(f"{video}.videoWidth") == 64
    before = browser.value(f"{video}.currentTime")
    browser.until(f"{video}.currentTime > {before} + 0.2")
    browser.press(" ", 32, " ")
    browser.until(f"{video}.paused")
    assert browser.value("document.documentElement.scrollWidth <= innerWidth")
    for scheme in ("light", "dark"):
        features = [dict(name="prefers-color-scheme", value=scheme)]
        browser.send("Emulation.setEmulatedMedia", features=features)
        picture = browser.send("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        (tmp_path / f"{width} {scheme}.png").write_bytes(base64.b64decode(picture))
