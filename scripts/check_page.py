#!/usr/bin/env python3
"""The chat page of `ferrotune serve` in headless Chromium: asks, reads the answer, asks again.

    python check_page.py BROWSER http://127.0.0.1:8000

Speaks the DevTools protocol over Chromium's own pipe (file descriptors 3 and 4): no driver, no packages.
"""
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

browser, address = sys.argv[1:]
# Above the numbers that the browser's ends get.
to_browser, from_browser = ([fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in os.pipe()] for _ in range(2))


def wire():
    os.dup2(to_browser[0], 3)
    os.dup2(from_browser[1], 4)


class Page:
    def __init__(self):
        self.number, self.held, self.session = 0, b"", None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.navigate", url=address)

    def call(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(to_browser[1], json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.held:
                piece = os.read(from_browser[0], 1 << 16)
                assert piece, "the browser has ended"
                self.held += piece
            reply, self.held = self.held.split(b"\0", 1)
            reply = json.loads(reply)
            if reply.get("id") == self.number:
                assert "error" not in reply, reply
                return reply["result"]

    def value(self, expression):
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, expression, seconds=30):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.value(expression):
                return
            time.sleep(0.05)
        raise AssertionError(f"not within {seconds} s: {expression}\n{self.value('document.body.innerText')}")


profile = tempfile.mkdtemp()
chromium = subprocess.Popen(
    [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
     f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"],
    preexec_fn=wire, close_fds=False, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
# A browser that ends is then an end of file here, unless a helper of its own outlives it.
os.close(to_browser[0])
os.close(from_browser[1])


def too_late(*_):
    raise AssertionError(f"Chromium did not answer within {LIMIT} s; it {'runs' if chromium.poll() is None else 'has ended'}")


LIMIT = 120
signal.signal(signal.SIGALRM, too_late)
signal.alarm(LIMIT)
try:
    page = Page()
    page.wait("document.readyState === 'complete' && !!document.getElementById('form')")
    say = """(text => { document.getElementById('text').value = text;
                        document.getElementById('form').requestSubmit(); })"""
    page.value(f"{say}('What is the opposite of hot?')")
    page.wait("[...document.querySelectorAll('.error')].some(turn => turn.textContent.includes('API key'))")
    page.value("document.getElementById('key').value = 'check-key';"
               "document.getElementById('key').dispatchEvent(new Event('change'))")
    page.wait("document.getElementById('model').value === 'tiny'")
    for turn in (1, 2):
        page.value(f"{say}('What is the opposite of hot?')")
        page.wait(f"document.querySelectorAll('.assistant').length === {turn} && "
                  "document.getElementById('send').textContent === 'Send'")
    first = page.value("document.querySelector('.assistant').textContent")
    assert first == "The opposite of hot is cold.", first
    page.value("document.getElementById('reset').click()")
    assert page.value("document.querySelectorAll('.turn').length") == 0
    print("the chat page in Chromium: ok")
finally:
    signal.alarm(0)
    # Its helpers too: they go on writing to the profile for a moment after their parent is gone.
    try:
        os.killpg(chromium.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    chromium.wait()
    shutil.rmtree(profile, ignore_errors=True)
