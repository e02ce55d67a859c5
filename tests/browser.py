"""A headless Chromium, spoken to by its DevTools protocol over a pipe: what a person would see of a page."""

import base64
import fcntl
import json
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

EXECUTABLE = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# All that can be read on the page, also inside web components.
TEXT = """(() => {
  const walk = node => [...node.childNodes].map(child =>
    child.nodeType == 3 ? child.data : child.nodeType == 1 && !['STYLE', 'SCRIPT', 'TEMPLATE'].includes(child.tagName)
      ? (child.shadowRoot ? walk(child.shadowRoot) : '') + walk(child) : '').join(' ');
  return walk(document.body).replace(/\\s+/g, ' ');
})()"""


class Browser:
    """One page of a browser; a context manager."""

    def __enter__(self) -> Self:
        self._profile = tempfile.TemporaryDirectory(prefix="alexnet_jax_browser_", ignore_cleanup_errors=True)
        commands, self._write = os.pipe()
        self._read, answers = os.pipe()
        arguments = [
            *(str(EXECUTABLE), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--no-first-run", "--remote-debugging-pipe", f"--user-data-dir={self._profile.name}", "about:blank"),
        ]
        # It reads from file 3 and answers on file 4; what it says to people goes nowhere.
        high = [fcntl.fcntl(file, fcntl.F_DUPFD, 10) for file in (commands, answers)]
        actions = [(os.POSIX_SPAWN_DUP2, file, number) for number, file in enumerate(high, 3)]
        actions += [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_WRONLY, 0) for number in (1, 2)]
        self._process = os.posix_spawn(str(EXECUTABLE), arguments, os.environ, file_actions=actions)
        for file in (commands, answers, *high):
            os.close(file)
        self._unread, self._number, self._session = b"", 0, None
        pages = [info for info in self._ask("Target.getTargets")["targetInfos"] if info["type"] == "page"]
        target = pages[0]["targetId"] if pages else self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.kill(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
        os.close(self._read)
        os.close(self._write)
        self._profile.cleanup()

    def open(self, url: str, width: int, height: int, *, dark: bool = False) -> None:
        """Shows a page in a window of so many pixels."""
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", features=[scheme])
        self._ask("Page.navigate", url=url)
        self.wait_for("document.readyState == 'complete'")

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        return self._ask("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def wait_for(self, condition: str, seconds: float = 60) -> None:
        """Returns once a JavaScript expression is true.

        Raises:
          TimeoutError: it did not become so.
        """
        deadline = time.monotonic() + seconds
        while not self.evaluate(condition):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {seconds} s: {condition}; the page says {self.evaluate(TEXT)[:2000]}")
            time.sleep(0.1)

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """What is seen as a PNG, or the whole page."""
        shot = self._ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _ask(self, method: str, **params: object) -> dict[str, Any]:
        self._number += 1
        session = {"sessionId": self._session} if self._session else {}
        message = json.dumps({"id": self._number, "method": method, "params": params, **session})
        os.write(self._write, message.encode() + b"\0")
        while True:
            while b"\0" not in self._unread:
                received = os.read(self._read, 1 << 16)
                if not received:
                    raise ConnectionError("the browser has ended")
                self._unread += received
            answer, self._unread = self._unread.split(b"\0", 1)
            decoded = json.loads(answer)
            if decoded.get("id") == self._number:
                if "error" in decoded:
                    raise RuntimeError(f"{method}: {decoded['error']['message']}")
                return decoded["result"]
