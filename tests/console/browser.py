"""A headless Chromium, driven over its DevTools protocol."""

import base64
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

CHROMIUM = shutil.which("chromium")
_START_S = 120.0
_WAIT_S = 60.0
_POLL_S = 0.02
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
    "--window-size=1200,800",
    "--remote-debugging-port=0",
    "about:blank",
)


class Page:
    """One tab: it runs scripts, presses keys, and remembers what it asked for and complained of.

    Attributes:
        asked: URLs of its requests.
        complaints: errors and exceptions of its console, and what its policy blocked.
    """

    def __init__(self, connection: ClientConnection) -> None:
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self._connection = connection
        self._numbers = itertools.count(1)
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.command(f"{domain}.enable")

    def command(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends one command and waits for its result; events that come before it are noted."""
        number = next(self._numbers)
        self._connection.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._connection.recv(timeout=_WAIT_S))
            if message.get("id") == number:
                assert "error" not in message, message["error"]
                return dict(message["result"])
            self._note(message.get("method"), message.get("params", {}))

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited if it is a promise."""
        result = self.command(
            "Runtime.evaluate",
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, expression: str) -> Any:
        """Returns the expression's value once it is true."""
        return until(lambda: self.evaluate(expression), expression)

    def open(self, url: str) -> None:
        self.command("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def text(self, selector: str) -> str:
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText"))

    def click(self, selector: str) -> None:
        self.evaluate(f"document.querySelector({json.dumps(selector)}).click()")

    def type(self, selector: str, text: str) -> None:
        """Puts the text into a field as if typed, in place of what was there."""
        field = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"{field}.focus(); {field}.select()")
        if text:
            self.command("Input.insertText", text=text)
        else:
            self.press("Delete")

    def press(self, key: str, control: bool = False) -> None:
        codes = {"Enter": 13, "Delete": 46, "ArrowRight": 39, "ArrowLeft": 37, "Escape": 27}
        names = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
        for kind in ("rawKeyDown", "keyUp"):
            self.command("Input.dispatchKeyEvent", type=kind, modifiers=2 * control, **names)

    def point_at(self, selector: str) -> None:
        """Moves the pointer onto the middle of an element."""
        box = self.evaluate(
            f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])"
            f"(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
        )
        self.command("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.command("Page.captureScreenshot")["data"]))

    def _note(self, method: str | None, params: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.complaints.append(str(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(str(params["entry"]))


def until(condition: Callable[[], Any], what: str) -> Any:
    """Returns the condition's value once it is true."""
    deadline = time.monotonic() + _WAIT_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"did not come to hold: {what}"
        time.sleep(_POLL_S)
    return value


@contextmanager
def chromium(profile: Path) -> Iterator[Page]:
    """A browser with a profile of its own; it and its children are gone afterwards."""
    assert CHROMIUM is not None
    command = [CHROMIUM, f"--user-data-dir={profile}", *_FLAGS]
    with (profile.parent / "chromium.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        with connect(_page_address(process, profile), max_size=None) as connection:
            page = Page(connection)
            yield page
            page.command("Browser.close")
            process.wait(timeout=_WAIT_S)
    finally:
        if process.poll() is None:
            process.kill()  # its children end with it: their pipes to it are closed
            process.wait()


def _page_address(process: "subprocess.Popen[bytes]", profile: Path) -> str:
    """Where the first tab listens; the browser writes its port once it does."""
    port_file = profile / "DevToolsActivePort"
    deadline = time.monotonic() + _START_S
    while not (port_file.exists() and len(port_file.read_text().splitlines()) == 2):
        assert process.poll() is None, "chromium ended before it listened"
        assert time.monotonic() < deadline, "chromium did not start in time"
        time.sleep(_POLL_S)
    port, path = port_file.read_text().splitlines()
    with connect(f"ws://127.0.0.1:{port}{path}", max_size=None) as browser:
        browser.send(json.dumps({"id": 1, "method": "Target.getTargets"}))
        targets = json.loads(browser.recv(timeout=_WAIT_S))["result"]["targetInfos"]
    page = next(target["targetId"] for target in targets if target["type"] == "page")
    return f"ws://127.0.0.1:{port}/devtools/page/{page}"
