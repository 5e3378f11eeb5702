"""Headless Chromium for pictures and tests of pages, driven over its DevTools protocol through two pipes.

Nothing is fetched: a page is a local file, and every request that it tries is recorded.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
TIMEOUT_SECONDS = 60.0
_LOWEST_FD = 10  # the browser's end of the pipes is moved to 3 and 4, where it looks for them


def find() -> str | None:
    """Return where Chromium is, ``None`` where it is not installed."""
    return next((found for found in map(shutil.which, NAMES) if found), None)


class BrowserError(RuntimeError):
    """The browser ended, did not answer, or refused a command."""


@dataclass
class Page:
    """A tab: what it asked for, and what it complained about."""

    browser: Browser
    session: str
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def call(self, method: str, **parameters: Any) -> Any:
        return self.browser.call(method, self.session, **parameters)

    def evaluate(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in answer:
            raise BrowserError(answer["exceptionDetails"]["text"])
        return answer["result"].get("value")

    def open(
        self,
        path: Path,
        *,
        width: int,
        height: int = 900,
        scheme: Literal["light", "dark"] = "light",
        scale: float = 1.0,
    ) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 500,
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=path.absolute().as_uri())
        self.browser.wait("Page.loadEventFired", self.session)

    def picture(self, height: int | None = None) -> bytes:
        """Return a PNG of the page from its top, all of it without a height."""
        size = self.call("Page.getLayoutMetrics")["cssLayoutViewport"]
        whole = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["clientWidth"], "height": height or whole["height"], "scale": 1}
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(answer["data"])


class Browser:
    """A running browser; use :func:`browser`."""

    def __init__(self, executable: str, profile: Path) -> None:
        theirs_in, self._out = _pipe()
        self._in, theirs_out = _pipe()
        environment = {**os.environ, "HOME": str(profile)}
        files: list[tuple[Any, ...]] = [(os.POSIX_SPAWN_DUP2, theirs_in, 3), (os.POSIX_SPAWN_DUP2, theirs_out, 4)]
        files += [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in (0, 1, 2)]
        command = [executable, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._process = os.posix_spawn(executable, command, environment, file_actions=files, setpgroup=0)
        os.close(theirs_in)
        os.close(theirs_out)
        self._rest = b""
        self._last = 0
        self._events: list[dict[str, Any]] = []
        self._pages: dict[str, Page] = {}

    def page(self) -> Page:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network", "Security"):
            self.call(f"{domain}.enable", session)
        return self._pages[session]

    def call(self, method: str, session: str | None = None, **parameters: Any) -> Any:
        self._last += 1
        number = self._last
        message = {"id": number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == number:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def wait(self, method: str, session: str) -> None:
        def seen() -> bool:
            return any(e["method"] == method and e.get("sessionId") == session for e in self._events)

        while not seen():
            self._read()
        self._events = [event for event in self._events if event["method"] != method]

    def close(self) -> None:
        os.close(self._out)  # the browser ends with its pipe
        os.close(self._in)
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            if os.waitpid(self._process, os.WNOHANG)[0]:
                break
            time.sleep(0.02)
        else:
            os.killpg(self._process, signal.SIGKILL)
            os.waitpid(self._process, 0)

    def _read(self) -> dict[str, Any]:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(self._in, 1 << 16) if ready else b""
            if not piece:
                raise BrowserError("the browser ended" if ready else "the browser does not answer")
            self._rest += piece
        first, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(first)
        if "method" in message:
            self._note(message)
        return message

    def _note(self, event: dict[str, Any]) -> None:
        self._events.append(event)
        page, given = self._pages.get(event.get("sessionId", "")), event["params"]
        if page is None:
            return
        if event["method"] == "Network.requestWillBeSent":
            page.requests.append(given["request"]["url"])
        elif event["method"] == "Log.entryAdded":
            page.complaints.append(given["entry"]["text"])
        elif event["method"] == "Runtime.consoleAPICalled":
            page.complaints.append(" ".join(str(item.get("value")) for item in given["args"]))
        elif event["method"] == "Runtime.exceptionThrown":
            page.complaints.append(given["exceptionDetails"]["text"])


def _pipe() -> tuple[int, int]:
    ends = os.pipe()
    moved = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, _LOWEST_FD) for end in ends]
    for end in ends:
        os.close(end)
    return moved[0], moved[1]


@contextmanager
def browser(executable: str) -> Iterator[Browser]:
    """Yield a browser with a profile of its own, which is removed with it."""
    with tempfile.TemporaryDirectory(prefix="compress-browser-", ignore_cleanup_errors=True) as profile:
        running = Browser(executable, Path(profile))
        try:
            yield running
        finally:
            running.close()
