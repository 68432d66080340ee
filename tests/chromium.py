"""A headless Chromium, driven through its DevTools protocol over a pipe."""

import json
import os
import select
import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ANSWER_SECONDS = 60


def find_chromium() -> str:
    """Its path; skips the test where none is installed."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    return found or pytest.skip(f"no headless browser is installed (looked for {', '.join(NAMES)})")


class Browser:
    """One tab. `problems` are errors that a page reports: the console's, exceptions, files that don't load.

    The browser reads commands from file descriptor 3 and writes answers and events to 4, each ended by a zero byte.
    """

    def __init__(self, profile: Path):
        to_read, self.commands = os.pipe()
        self.answers, to_write = os.pipe()
        shell = f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}'
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        self.process = subprocess.Popen(
            ["bash", "-c", shell, find_chromium(), *flags, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_read, to_write),
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self.received, self.session, self.number = b"", {}, 0
        self.events, self.problems = [], []
        tab = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=tab, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def read(self) -> dict:
        while b"\0" not in self.received:
            ready, _, _ = select.select([self.answers], [], [], ANSWER_SECONDS)
            part = os.read(self.answers, 1 << 20) if ready else b""
            if not part:
                raise EOFError(f"the browser has ended, or is silent for {ANSWER_SECONDS} s")
            self.received += part
        message, _, self.received = self.received.partition(b"\0")
        return json.loads(message)

    def call(self, method: str, **params) -> dict:
        self.number += 1
        command = {"id": self.number, "method": method, "params": params, **self.session}
        os.write(self.commands, json.dumps(command).encode() + b"\0")
        while (message := self.read()).get("id") != self.number:
            self.note(message)
        assert "error" not in message, message
        return message["result"]

    def note(self, event: dict) -> None:
        self.events.append(event["method"])
        params = event["params"]
        if event["method"] == "Runtime.exceptionThrown" or params.get("type") in ("error", "assert"):
            self.problems.append(params)
        if event["method"] == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(params["entry"])

    def open(self, page: Path, *, width: int, dark: bool = False) -> None:
        """Loads a file, at a width in pixels, until it and all its pictures have arrived or failed."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events = []
        self.call("Page.navigate", url=page.resolve().as_uri())
        while "Page.loadEventFired" not in self.events:
            self.note(self.read())

    def evaluate(self, script: str):
        """The value of an expression in the page."""
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"]["value"]

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)
        os.close(self.commands)
        os.close(self.answers)
