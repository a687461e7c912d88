"""A page in headless Chromium, driven over a pipe: what it requests, says on the console, plays and
looks like.

    python tests/browser.py report.html FOLDER     writes screenshots at 1400 and 390 pixels, light and dark
"""
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """Chromium's remote debugging over file descriptors 3 and 4: JSON messages that end with a zero
    byte."""
    def __init__(self, folder):
        to_child, self.write = os.pipe()
        self.read, from_child = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
                 "--disable-component-update", "--no-first-run", "--mute-audio", "--hide-scrollbars",
                 "--disable-dev-shm-usage", f"--user-data-dir={folder}", "--remote-debugging-pipe"]
        # the shell puts the pipes at 3 and 4, whatever their numbers here
        command = ["bash", "-c", f'exec "$0" "$@" 3<&{to_child} 4>&{from_child}', CHROMIUM, *flags, "about:blank"]
        self.process = subprocess.Popen(command, pass_fds=(to_child, from_child), stderr=subprocess.DEVNULL,
                                        stdout=subprocess.DEVNULL, env=os.environ | {"HOME": str(folder)})
        os.close(to_child)
        os.close(from_child)
        self.buffer, self.number, self.events, self.session = b"", 0, [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def message(self):
        while b"\0" not in self.buffer:
            part = os.read(self.read, 1 << 20)
            if not part:
                raise RuntimeError("the browser ended")
            self.buffer += part
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def call(self, method, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.message()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def evaluate(self, script):
        """The value of a piece of JavaScript, awaited."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True,
                           userGesture=True)
        return result["result"].get("value")

    def open(self, file, width=1400, height=900, dark=False):
        """Opens a file, and waits until it has loaded."""
        self.events.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=Path(file).resolve().as_uri())
        end = time.monotonic() + 60
        while self.evaluate("document.readyState + location.protocol") != "completefile:":
            if time.monotonic() > end:
                raise RuntimeError(f"{file}: not loaded")
            time.sleep(0.05)

    def happened(self, *methods):
        self.evaluate("new Promise(done => setTimeout(done, 100))")
        return [event for event in self.events if event["method"] in methods]

    def screenshot(self, file, whole=True):
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 12000), "scale": 1}
        more = {"clip": clip, "captureBeyondViewport": True} if whole else {}
        Path(file).write_bytes(base64.b64decode(self.call("Page.captureScreenshot", **more)["data"]))

    def close(self):
        self.process.terminate()
        self.process.wait(timeout=30)
        os.close(self.read)
        os.close(self.write)


if __name__ == "__main__":
    page, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        browser = Browser(folder)
        for width in (1400, 390):
            for dark in (False, True):
                browser.open(page, width, dark=dark)
                name = f"{page.stem}_{width}_{'dark' if dark else 'light'}.png"
                browser.screenshot(out / name)
                print(name, "content is", browser.evaluate("document.documentElement.scrollWidth"), "wide")
        browser.close()
