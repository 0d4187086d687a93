"""Debian's Chromium in headless mode, controlled by its DevTools protocol over two pipes."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


class Browser:
    """One page of a browser.

    Args:
        profile: empty folder for what the browser writes.
        width: of the window in pixels.
        height: of the window in pixels.

    Attributes:
        problems: what the page wrote to the console as warning or error, exceptions, and files that did not load.
    """

    def __init__(self, profile: Path, *, width: int = 1300, height: int = 1000) -> None:
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
        # The protocol is spoken on descriptors 3 and 4.
        command = (
            f'exec "$0" --remote-debugging-pipe --user-data-dir="$1" --window-size={width},{height} '
            f"{' '.join(options)} about:blank 3<&{to_browser} 4>&{from_browser}"
        )
        self._process = subprocess.Popen(
            ["bash", "-c", command, str(CHROMIUM), str(profile)],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self.problems: list[str] = []
        self._received, self._number = b"", 0
        self._session = ""
        target = next(t for t in self._ask("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self._ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._ask(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._process.terminate()
        self._process.wait(timeout=20)
        os.close(self._write)
        os.close(self._read)

    def open(self, page: Path, *, ready: str = "document.readyState === 'complete'") -> None:
        """Open a file and wait until the expression `ready` holds."""
        self._ask("Page.navigate", url=page.resolve().as_uri())
        self.wait_for(ready)

    def wait_for(self, expression: str, *, seconds: float = 60) -> None:
        """Wait until a JavaScript expression holds; one that fails, on a page that is not there yet, does not hold."""
        end = time.monotonic() + seconds
        while not self.evaluate(f"(() => {{ try {{ return Boolean({expression}) }} catch {{ return false }} }})()"):
            assert time.monotonic() < end, f"{expression} does not hold after {seconds} s; {self.problems}"
            time.sleep(0.05)

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        answer = self._ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def mouse(self, selector: str, x: float, y: float, *, click: bool = False) -> None:
        """Move the mouse to a place in an element, as shares of its width and height, and click there if asked."""
        box = self.evaluate(
            f"(e => {{ e.scrollIntoView({{block: 'nearest'}}); const b = e.getBoundingClientRect(); "
            f"return [b.left + b.width * {x}, b.top + b.height * {y}]; }})(document.querySelector({selector!r}))"
        )
        at = {"x": box[0], "y": box[1]}
        self._ask("Input.dispatchMouseEvent", type="mouseMoved", **at)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            self._ask("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)

    def choose(self, selector: str, value: str) -> None:
        """Choose an entry of a `<select>` by its value."""
        self.evaluate(
            f"(e => {{ e.value = {value!r}; e.dispatchEvent(new Event('change')); }})"
            f"(document.querySelector({selector!r}))"
        )

    def screenshot(self, target: Path) -> None:
        """Write the whole page as a PNG file."""
        answer = self._ask("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        target.write_bytes(base64.b64decode(answer["data"]))

    def _ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self._note(answer)

    def _next(self, *, seconds: float = 90) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while b"\0" not in self._received:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"Chromium did not answer for {seconds} s"
            chunk = os.read(self._read, 1 << 20)
            assert chunk, "Chromium ended"
            self._received += chunk
        message, _, self._received = self._received.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event["method"] == "Runtime.exceptionThrown":
            self.problems.append(str(params["exceptionDetails"].get("exception", params)))
        elif event["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.problems.append(str([argument.get("value") for argument in params["args"]]))
        elif event["method"] == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(params["entry"]["text"])
