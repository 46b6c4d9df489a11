"""A headless Chromium, driven through chromedriver's HTTP interface (W3C WebDriver)."""

import json
import re
import shutil
import subprocess
import urllib.request
from contextlib import contextmanager

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1280,900"),
)


def missing():
    """What is not installed, or nothing."""
    browsers = ("chromium", "chromium-browser", "google-chrome")
    return [
        name
        for name, installed in (
            ("chromium", any(map(shutil.which, browsers))),
            ("chromedriver", shutil.which("chromedriver")),
        )
        if not installed
    ]


class Page:
    """A browser's page: scripts run in it, elements are clicked as a person would."""

    def __init__(self, base):
        self.base = base

    def call(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, address):
        self.call("POST", "/url", {"url": "about:blank"})
        self.call("POST", "/url", {"url": address})

    def run(self, script):
        return self.call("POST", "/execute/sync", {"script": script, "args": []})

    def click(self, selector):
        (element,) = self.call("POST", "/element", {"using": "css selector", "value": selector}).values()
        self.call("POST", f"/element/{element}/click", {})

    def width(self, pixels):
        """Look at the page as a screen so wide would."""
        size = {"width": pixels, "height": 900, "deviceScaleFactor": 1, "mobile": pixels < 700}
        self.call("POST", "/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": size})


@contextmanager
def chromium(profile):
    """A page in a new browser whose profile lies in a folder."""
    driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        port = next(match[1] for line in driver.stdout if (match := re.search(r"successfully on port (\d+)", line)))
        base = f"http://127.0.0.1:{port}/session"
        options = {"args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        session = Page(base).call("POST", "", wanted)["sessionId"]
        page = Page(f"{base}/{session}")
        try:
            yield page
        finally:
            page.call("DELETE", "")
    finally:
        driver.terminate()
        driver.wait()
