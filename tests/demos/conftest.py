from __future__ import annotations

import http.server
import sys
import threading
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

pytest.importorskip("gradio", reason="the demos need the extra [demo]")


@pytest.fixture(scope="session")
def models(demo_models):
    return demo_models


@pytest.fixture(scope="session")
def folder(demo_folder):
    """The private folder of the server under test."""
    return demo_folder


@pytest.fixture(scope="session")
def server(demo_server):
    """The whole page on loopback; its address without a slash at the end."""
    return demo_server


class _Canary(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.hits.append(self.path)
        self.send_response(200)
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815  (the name is http.server's)
    do_POST = do_GET  # noqa: N815

    def log_message(self, *args):
        pass


@pytest.fixture
def canary():
    """A server that nobody should reach; yields (address, list of hits)."""
    trap = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Canary)
    trap.hits = []
    thread = threading.Thread(target=trap.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{trap.server_port}", trap.hits
    trap.shutdown()
    trap.server_close()
