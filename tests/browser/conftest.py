r"""The built site and the browser, shared by the tests of this folder, which skip themselves without the extra docs."""

import http.server
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    r"""The site, built as strictly as Sphinx can."""
    out = tmp_path_factory.mktemp("site")
    command = f"-m sphinx -q -W -n -E -b html -d {out}/.trees docs {out}".split()
    built = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return out


@pytest.fixture(scope="session")
def address(site):
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=site)
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright  # an extra

    with sync_playwright() as play:
        own = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        browser = play.chromium.launch(
            executable_path=own, args=["--no-sandbox"]
        )  # an error without Chromium
        yield browser
        browser.close()
