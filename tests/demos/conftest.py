from __future__ import annotations

import http.server
import os
import sys
import threading
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

pytest.importorskip("gradio", reason="the demos need the extra [demo]")


@pytest.fixture(scope="session")
def models():
    from mmattn_demos.models import Models

    return Models()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The private folder of the server under test."""
    place = tmp_path_factory.mktemp("private")
    place.chmod(0o700)
    before = os.environ.get("GRADIO_TEMP_DIR")
    os.environ["GRADIO_TEMP_DIR"] = str(place)
    yield place
    if before is None:
        del os.environ["GRADIO_TEMP_DIR"]
    else:
        os.environ["GRADIO_TEMP_DIR"] = before


@pytest.fixture(scope="session")
def server(models, folder):
    """The whole page on loopback; yields its address without a slash at the end."""
    from mmattn_demos import app, serving

    blocks = app.build(models)
    address = serving.serve(blocks, wait=False)
    yield address.rstrip("/")
    blocks.close()


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
