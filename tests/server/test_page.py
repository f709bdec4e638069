"""The operator's page: both languages, nothing fetched from elsewhere, its whole round in a browser."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from musetalk.server.page_http import PAGE
from musetalk.tools.demo import PORTRAIT, SPEECH
from tests.served import Served

HTML = (PAGE / "index.html").read_text("utf-8")
WORDS = (PAGE / "words.js").read_text("utf-8")
SCRIPTS = {path.name: path.read_text("utf-8") for path in PAGE.glob("*.js")}
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),
    "--autoplay-policy=no-user-gesture-required",
)
WAIT_SECONDS = 90
STATE = 'document.getElementById("screen").dataset.state'
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER and importlib.util.find_spec("selenium")),
    reason="needs chromium, chromedriver and selenium",
)


def dictionary(name: str) -> dict[str, str]:
    """The words of one language in words.js."""
    body = re.search(rf"const {name} = \{{(.*?)\n\}};", WORDS, re.S)
    assert body
    return dict(re.findall(r'(\w+): "((?:[^"\\]|\\.)*)"', body[1]))


def test_every_word_is_there_in_both_languages():
    english, chinese = dictionary("ENGLISH"), dictionary("CHINESE")
    in_html = set(re.findall(r'data-i18n(?:-label)?="(\w+)"', HTML))
    said = {key for script in SCRIPTS.values() for key in re.findall(r'\bsay\("(\w+)"', script)}
    assert in_html <= set(chinese) and set(english) <= set(chinese)
    assert said <= set(english) | in_html
    for key, words in english.items():
        assert set(re.findall(r"\{\w+\}", words)) == set(re.findall(r"\{\w+\}", chinese[key])), key


def test_every_control_has_a_name_for_who_listens():
    controls = re.findall(r"<(button|input|select|video|meter|progress)\b([^>]*)>(.*?)(?=<)", HTML, re.S)
    assert len(controls) > 20
    for tag, attributes, text in controls:
        hidden = 'aria-hidden="true"' in attributes
        inside_label = tag in ("input", "select") and "aria-label" not in attributes
        named = "aria-label" in attributes or "data-i18n" in attributes or text.strip()
        assert hidden or named or inside_label or "<svg" in HTML.split(attributes, 1)[1][:8], attributes


def test_nothing_is_fetched_from_elsewhere():
    for content in (HTML, (PAGE / "style.css").read_text("utf-8"), *SCRIPTS.values()):
        assert not re.search(r"(?:src|href)=\"(?:https?:)?//|url\(|@import|import .*https?:", content)


def test_all_its_files_are_served_under_a_strict_policy(served):
    names = ["", *(f"page/{path.name}" for path in PAGE.iterdir()), "page/example.jpg"]
    for name in names:
        status, headers, content = served.call("GET", f"/{name}")
        assert status == 200 and content and "default-src 'self'" in headers["content-security-policy"]


@pytest.mark.parametrize("name", ["../page_http.py", "..%2fpage_http.py", "x.js", "style.css.bak", ".js"])
def test_nothing_else_is_served(served, name):
    assert served.call("GET", f"/page/{name}")[0] == 404


def test_a_template_is_shown_as_it_is(served):
    import cv2
    import numpy as np

    status, headers, content = served.call("GET", "/v1/templates/%E5%B0%8F%E5%93%88%20(1)/picture")
    assert (status, headers["content-type"]) == (200, "image/jpeg")
    picture = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    difference = np.abs(picture.astype(int) - cv2.imread(str(PORTRAIT)).astype(int))
    assert difference.mean() < 4
    assert served.call("GET", "/v1/templates/none/picture")[0] == 404


class Browser:
    """A page that is open in a browser."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def run(self, script: str) -> Any:
        return self.driver.execute_script(f"return {script}")

    def until(self, script: str) -> Any:
        """The value of `script` once it is true."""
        from selenium.common.exceptions import TimeoutException
        from selenium.webdriver.support.ui import WebDriverWait

        waiting = WebDriverWait(self.driver, WAIT_SECONDS, 0.1)
        with contextlib.suppress(TimeoutException):
            return waiting.until(lambda _: self.run(script))
        told = self.run("document.getElementById('problems').innerText + ' ' + " + STATE)
        pytest.fail(f"never true: {script}; the page says {told!r}; {self.complaints()}")

    def click(self, name: str) -> None:
        self.driver.find_element("id", name).click()

    def give(self, name: str, path: Path) -> None:
        self.driver.find_element("id", name).send_keys(str(path))

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture
def open_page(served: Served, tmp_path) -> Iterator[Callable[..., Browser]]:
    """Opens the page at a width, dark or light."""
    from selenium import webdriver

    opened = []

    def begin(width: int = 1280, height: int = 900, *, dark: bool = False) -> Browser:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'browser'}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        opened.append(driver)
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        still = {"name": "prefers-reduced-motion", "value": "reduce"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [theme, still]})
        driver.get(f"http://127.0.0.1:{served.http_port}/")
        return Browser(driver)

    yield begin
    for driver in opened:
        driver.quit()


MOUTH = """(() => {
  const video = document.getElementById("live"), canvas = document.createElement("canvas");
  canvas.width = canvas.height = 512;
  const pen = canvas.getContext("2d");
  pen.drawImage(video, 0, 0, 512, 512);
  const {data} = pen.getImageData(200, 150, 50, 40);
  let sum = 0;
  for (let i = 0; i < data.length; i += 4) sum += data[i + 1];
  return sum;
})()"""


@needs_browser
def test_the_whole_round_upload_template_live_render_download(served, open_page, tmp_path):
    page = open_page()
    page.give("picture-file", PORTRAIT)
    page.until('!document.getElementById("legend").hidden')  # the preview was drawn
    before = page.run('document.getElementById("preview").src')
    page.run('document.querySelector("input[value=neck]").click()')
    page.until(f'document.getElementById("preview").src !== "{before}"')
    page.run('document.getElementById("name").value = "round trip"')
    page.click("make")
    page.until('document.getElementById("live-template").value === "round trip"')
    made = served.call("GET", "/v1/templates/round%20trip")[2]
    assert (made["valid"], made["parsing_mode"]) == (True, "neck")
    note = 'document.getElementById("make-note").textContent'
    told = page.run(note)
    page.click("language")
    assert "round trip" in told and "round trip" in page.run(note) and page.run(note) != told
    page.click("language")
    assert page.run(note) == told

    page.click("connect")
    page.until(f'{STATE} === "idle" && document.getElementById("live").currentTime > 0')
    page.give("speech-file", SPEECH)
    page.until(f'{STATE} === "talking"')
    page.run("window.mouths = new Set()")
    page.until(f"mouths.add({MOUTH}) && mouths.size > 5 && Math.max(...mouths) > 1.02 * Math.min(...mouths)")
    page.until('document.getElementById("live").webkitAudioDecodedByteCount > 0')
    page.click("interrupt")
    page.until(f'{STATE} === "idle"')
    page.click("microphone")  # the browser's stand-in for one beeps
    page.until(f'{STATE} === "talking"')
    page.click("microphone")
    page.until(f'{STATE} === "idle"')
    page.click("connect")
    page.until(f'{STATE} === "ready"')

    page.give("render-file", SPEECH)
    page.click("start-render")
    page.until('document.querySelector(".job .tag.completed")')
    link = page.until('document.querySelector(".job a.button")?.href')
    status, headers, content = served.call("GET", link.split(str(served.http_port), 1)[1])
    assert status == 200 and headers["content-type"] == "video/mp4" and content[4:8] == b"ftyp"
    page.until('document.querySelector(".sheet")?.width > 400')
    assert served.call("GET", "/v1/sessions")[2]["capacity"]["active"] == 0
    assert page.complaints() == []


SOUND = """(async () => {
  const video = document.getElementById("live"), stream = video.srcObject || video.captureStream();
  const context = new AudioContext(), meter = context.createAnalyser(), heard = new Float32Array(2048);
  context.createMediaStreamSource(stream).connect(meter);
  window.loudest = 0;
  setInterval(() => {
    meter.getFloatTimeDomainData(heard);
    window.loudest = Math.max(window.loudest, ...heard.map(Math.abs));
  }, 50);
})()"""


@needs_browser
@pytest.mark.parametrize(
    "way",
    [
        "mp4",
        pytest.param(
            "webrtc",
            marks=pytest.mark.skipif(importlib.util.find_spec("aiortc") is None, reason="needs aiortc"),
        ),
    ],
)
def test_whoever_presses_speak_sees_and_hears_the_face_either_way(served, open_page, way):
    page = open_page()
    page.until('document.querySelector(".tile") && !document.getElementById("microphone").disabled')
    if way == "webrtc":
        page.until('!document.getElementById("watch-field").hidden')
        page.run('document.getElementById("watch").value = "webrtc"')
        page.run('document.getElementById("watch").dispatchEvent(new Event("change"))')
    page.click("microphone")  # goes live by itself; the browser's stand-in for one beeps
    page.until('document.getElementById("live").videoWidth === 512')
    page.until(f'{STATE} === "talking"')
    page.click("microphone")
    page.until(f'{STATE} === "idle"')
    assert page.run('Boolean(document.getElementById("live").srcObject)') == (way == "webrtc")
    page.run(SOUND)
    page.give("speech-file", SPEECH)
    page.until(f'{STATE} === "talking"')
    page.run("window.mouths = new Set()")
    page.until(f"mouths.add({MOUTH}) && mouths.size > 5 && Math.max(...mouths) > 1.02 * Math.min(...mouths)")
    page.until("window.loudest > 0.05")
    page.click("connect")
    page.until(f'{STATE} === "ready"')
    page.until("document.querySelectorAll('#sessions tr').length === 0")
    assert page.complaints() == []


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(360, True), (1280, False), (3840, True)])
def test_it_fits_every_width_in_both_languages(open_page, width, dark):
    page = open_page(width, dark=dark)
    page.until('document.querySelector(".tile")')
    english = page.run("document.body.innerText")
    for _ in range(2):
        assert page.run("document.documentElement.scrollWidth") <= width
        page.click("language")
    page.click("language")
    chinese = page.run("document.body.innerText")
    assert "Go live" in english and "开始直播" in chinese and "Go live" not in chinese
    colour = page.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", colour))) < 200) == dark
    page.click("theme")
    assert page.run("document.documentElement.dataset.theme") == ("light" if dark else "dark")
    assert page.complaints() == []


@needs_browser
def test_every_part_is_reached_by_the_keyboard(open_page):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    page = open_page()
    page.until('document.querySelector(".tile")')
    reached = []
    for _ in range(40):
        ActionChains(page.driver).send_keys(Keys.TAB).perform()
        reached.append(page.run("document.activeElement.id || document.activeElement.className"))
    assert {"language", "live-template", "connect", "drop", "name", "shift", "render-template"} <= set(
        reached
    )


WHEP = """
const [address, done] = arguments, peer = new RTCPeerConnection(), video = document.createElement("video");
video.muted = true;
video.srcObject = new MediaStream();
peer.ontrack = ({track}) => { video.srcObject.addTrack(track); video.play(); };
for (const kind of ["video", "audio"]) peer.addTransceiver(kind, {direction: "recvonly"});
(async () => {
  await peer.setLocalDescription(await peer.createOffer());
  await new Promise((met) => {
    peer.onicegatheringstatechange = () => peer.iceGatheringState === "complete" && met();
    setTimeout(met, 500);
  });
  const answer = await fetch(address, {method: "POST", headers: {"Content-Type": "application/sdp"},
    body: peer.localDescription.sdp});
  await peer.setRemoteDescription({type: "answer", sdp: await answer.text()});
  const look = setInterval(async () => {
    let sound = 0;
    (await peer.getStats()).forEach((told) => {
      if (told.type === "inbound-rtp" && told.kind === "audio") sound = told.packetsReceived;
    });
    if (video.videoWidth && video.currentTime > 0.5 && sound) {
      clearInterval(look);
      done([video.videoWidth, video.videoHeight, sound]);
      peer.close();
    }
  }, 100);
})();
"""


@needs_browser
@pytest.mark.skipif(
    importlib.util.find_spec("aiortc") is None, reason="needs aiortc: requirements-webrtc.txt"
)
def test_a_browser_plays_the_whep_stream(served, open_page):
    session = served.call("POST", "/v1/sessions", {"template_id": "小哈 (1)"})[2]
    page = open_page()
    page.driver.set_script_timeout(WAIT_SECONDS)
    width, height, sound = page.driver.execute_async_script(WHEP, session["addresses"]["whep"])
    served.call("DELETE", f"/v1/sessions/{session['session_id']}")
    assert (width, height) == (512, 512) and sound > 5
