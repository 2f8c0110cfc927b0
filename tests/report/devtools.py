"""Chromium driven over its DevTools pipe, with the standard library only.

The browser reads commands from file descriptor 3 and writes answers and events to 4, JSON messages ended by NUL.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys

EXECUTABLE = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
]

# Puts the two ends of the pipes where Chromium looks for them; copies first, for an end may itself be number 3 or 4.
_LAUNCH = """
import fcntl, os, sys
commands, answers = (fcntl.fcntl(int(fd), fcntl.F_DUPFD, 20) for fd in sys.argv[1:3])
os.dup2(commands, 3)
os.dup2(answers, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Page:
    """One tab: `call` sends a command and returns its result; what happened meanwhile gathers in `events`."""

    def __init__(self, write_end, read_end):
        self._write, self._read, self._buffer, self._count, self._session = write_end, read_end, b"", 0, None
        self.events = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def open(self, url):
        self.events.clear()
        self.call("Page.navigate", url=url)
        while not self.of("Page.loadEventFired"):
            self.events.append(self._next())

    def evaluate(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def of(self, method):
        return [event["params"] for event in self.events if event.get("method") == method]

    def complaints(self):
        """Texts of uncaught exceptions, console errors and warnings, and the browser's own log (blocked loads)."""
        thrown = [event["exceptionDetails"]["text"] for event in self.of("Runtime.exceptionThrown")]
        calls = self.of("Runtime.consoleAPICalled")
        said = [str(event["args"]) for event in calls if event["type"] in ("error", "warning", "assert")]
        return thrown + said + [event["entry"]["text"] for event in self.of("Log.entryAdded")]

    def requests(self):
        """Addresses the page asked for, inline `data:` ones left out."""
        asked = [event["request"]["url"] for event in self.of("Network.requestWillBeSent")]
        return [url for url in asked if not url.startswith("data:")]

    def _next(self):
        while b"\0" not in self._buffer:
            chunk = os.read(self._read, 1 << 16)
            if not chunk:
                raise RuntimeError("Chromium closed the pipe")
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


@contextlib.contextmanager
def browser(profile):
    """A `Page` in a fresh browser with its profile in the folder `profile`; the browser ends with the block."""
    commands_out, commands_in = os.pipe()
    answers_out, answers_in = os.pipe()
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            _LAUNCH,
            str(commands_out),
            str(answers_in),
            EXECUTABLE,
            *_FLAGS,
            f"--user-data-dir={profile}",
        ],
        pass_fds=(commands_out, answers_in),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(commands_out)
    os.close(answers_in)
    try:
        yield Page(commands_in, answers_out)
    finally:
        os.close(commands_in)  # Chromium quits when its commands end
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(answers_out)
