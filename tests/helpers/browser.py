"""A page in headless Chromium, spoken to over its debugging pipe: what it draws, says to the console, and asks the network for."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
SWITCHES = [
    f"--{word}"
    for word in [
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "hide-scrollbars",
        "remote-debugging-pipe",
    ]
]
PATIENCE = 90  # seconds


class Tab:
    """One tab. What it complained about is in `complaints`, and what it asked for in `requests`."""

    def __init__(self, to: int, answers: int):
        self._to, self._from, self._rest = to, answers, b""
        self._numbers = itertools.count(1)
        self._session: dict[str, str] = {}
        self.complaints: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Runtime", "Log", "Network", "Page"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a command; events that come before it are noted."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters, **self._session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            said = self._next()
            if said.get("id") == number:
                assert "error" not in said, said
                return said["result"]
            self._note(said.get("method"), said.get("params"))

    def open(self, page: Path, width: int, scheme: str = "light") -> None:
        """Load a page at a width in pixels and a colour scheme, and wait until its figures are drawn."""
        self.look(width, scheme)
        self.call("Page.navigate", url=page.resolve().as_uri())
        self.wait(
            "document.readyState === 'complete' && !document.querySelector('figure[data-chart]:not([data-state=live])')"
        )

    def look(self, width: int, scheme: str) -> None:
        """Change width and colour scheme of what is open."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def value(self, expression: str) -> Any:
        """Of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until an expression is true."""
        end = time.monotonic() + PATIENCE
        while not self.value(expression):
            assert time.monotonic() < end, f"never true: {expression}; {self.complaints}"
            time.sleep(0.1)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._from], [], [], PATIENCE)[0], "Chromium does not answer"
            part = os.read(self._from, 2**16)
            assert part, "Chromium has ended"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def _note(self, method: str | None, told: Any) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(told["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(told["args"]))
        elif method == "Log.entryAdded":
            self.complaints.append(told["entry"]["text"])


@contextlib.contextmanager
def tab() -> Iterator[Tab]:
    """A tab of a Chromium of its own."""
    assert CHROMIUM is not None
    commands, answers = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # the pipe is to be its file descriptors 3 and 4; the shell moves them there
        words = [CHROMIUM, *SWITCHES, f"--user-data-dir={profile}", "about:blank"]
        shell = f'exec "$@" 3<&{commands[0]} 4>&{answers[1]}'
        process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *words],
            pass_fds=(commands[0], answers[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield Tab(commands[1], answers[0])
        finally:
            process.kill()
            process.wait()
            for end in (*commands, *answers):
                os.close(end)
