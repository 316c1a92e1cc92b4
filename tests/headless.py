"""A page in headless Chromium, driven over a pipe: no server, no client library."""
import json
import os
import shutil
import subprocess
import tempfile
import time

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SETTINGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--remote-debugging-pipe")


class Page:
    """Use with `with Page(path) as page`; `page.errors` has what the console complained about."""

    def __init__(self, path, size=(1200, 900)):
        self.path, self.size, self.errors, self.number = path, size, [], 0

    def __enter__(self):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        reads, self.out = os.pipe()
        self.back, writes = os.pipe()
        command = [CHROMIUM, *SETTINGS, f"--user-data-dir={self.profile.name}", "about:blank"]
        shell = f'exec "$@" 3<&{reads} 4>&{writes}'
        self.process = subprocess.Popen(["bash", "-c", shell, "bash", *command], pass_fds=(reads, writes),
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(reads), os.close(writes)
        self.waiting, self.session, self.events = b"", None, []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")
        self.ask("Emulation.setDeviceMetricsOverride", width=self.size[0], height=self.size[1], deviceScaleFactor=1, mobile=False)
        self.load()
        return self

    def __exit__(self, *error):
        os.close(self.out), os.close(self.back)
        self.process.terminate()
        self.process.wait(20)
        self.profile.cleanup()

    def ask(self, method, **params):
        """The answer to a command of the DevTools protocol."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params} | ({"sessionId": self.session} if self.session else {})
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            found = self.next()
            if found.get("id") == self.number:
                assert "error" not in found, found
                return found["result"]

    def next(self):
        while b"\0" not in self.waiting:
            piece = os.read(self.back, 1 << 20)
            assert piece, "Chromium ended"
            self.waiting += piece
        line, self.waiting = self.waiting.split(b"\0", 1)
        found = json.loads(line)
        if found.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded", "Page.javascriptDialogOpening"):
            self.errors.append(found["params"])
        self.events.append(found.get("method"))
        return found

    def load(self):
        self.events.clear()
        self.ask("Page.navigate", url=f"file://{self.path}")
        while "Page.loadEventFired" not in self.events:
            self.next()

    def run(self, expression):
        """The value of a JavaScript expression."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, *keys):
        for key in keys:
            text = {"text": key} if len(key) == 1 else {}
            self.ask("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
            self.ask("Input.dispatchKeyEvent", type="keyUp", key=key)

    def wait(self, condition, seconds=10):
        """Until a Python function is true."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.02)
