"""A headless Chromium on a page, driven by its DevTools protocol through a pair of pipes."""

import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
SECONDS = 60  # time limit of an answer


class Browser:
    """One page; `errors` holds console errors and uncaught exceptions.

    width, height: of the window, in CSS pixels.
    """

    def __init__(self, profile: Path, width: int = 1200, height: int = 800) -> None:
        theirs_in, self.output = os.pipe()
        self.input, theirs_out = os.pipe()
        arguments = (
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--no-first-run", "--disable-background-networking", "--remote-debugging-pipe"),
            *(f"--user-data-dir={profile}", f"--window-size={width},{height}", "about:blank"),
        )
        # Chromium reads its file 3 and writes its file 4
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}', CHROMIUM, *arguments],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.rest, self.number, self.session = b"", 0, None
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.events: list[str] = []
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(timeout=SECONDS)
        os.close(self.output)
        os.close(self.input)

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": arguments}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.output, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def receive(self) -> dict[str, Any]:
        """Return the next message; record errors and requests."""
        deadline = time.monotonic() + SECONDS
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.input], [], [], max(0, deadline - time.monotonic()))
            assert ready, "Chromium does not answer"
            received = os.read(self.input, 1 << 16)
            assert received, "Chromium ended"
            self.rest += received
        text, _, self.rest = self.rest.partition(b"\0")
        message = json.loads(text)
        event, kind = message.get("params", {}), message.get("method", "")
        self.events.append(kind)
        if kind == "Runtime.consoleAPICalled" and event["type"] in ("error", "warning", "assert"):
            self.errors.append(json.dumps(event["args"]))
        elif kind == "Log.entryAdded" and event["entry"]["level"] in ("error", "warning"):
            self.errors.append(event["entry"]["text"])
        elif kind == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(event["exceptionDetails"]))
        elif kind == "Network.requestWillBeSent":
            self.requests.append(event["request"]["url"])
        return message

    def open(self, address: str) -> None:
        """Load a page and wait until it is loaded."""
        for url in ("about:blank", address):
            self.events.clear()
            self.call("Page.navigate", url=url)
            while "Page.loadEventFired" not in self.events:
                self.receive()

    def value(self, expression: str) -> Any:
        """Evaluate a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def hover(self, selector: str, block: str = "center") -> None:
        """Move the mouse onto the first element of a selector, scrolled to `block`."""
        place = self.value(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            f"e.scrollIntoView({{block: '{block}'}}); const b = e.getClientRects()[0];"
            "return {x: b.x + b.width / 2, y: b.y + b.height / 2}; })()"
        )
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **place)

    def press(self, key: str) -> None:
        """Press a control key such as `Tab` or `ArrowRight`."""
        codes = {"Tab": 9, "Escape": 27, "End": 35, "ArrowLeft": 37, "ArrowRight": 39}
        for kind in ("rawKeyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                **{"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": codes[key]},
            )

    def theme(self, name: str) -> None:
        """Set the colour scheme, light or dark."""
        preference = {"name": "prefers-color-scheme", "value": name}
        self.call("Emulation.setEmulatedMedia", features=[preference])
