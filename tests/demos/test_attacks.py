"""Requests that a visitor's browser would not send: files, other servers, bombs, floods, disguises."""

from __future__ import annotations

import json
import stat
import threading
import time
from io import BytesIO
from pathlib import Path

import httpx
import pytest
from bombs import png_header
from mmattn_demos import guarding, limits
from PIL import Image

import mmattn

API = "/gradio_api"


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server, timeout=20) as client:
        yield client


def call(client, name, data):
    """The last event of an API call and what came with it."""
    started = client.post(f"{API}/call/{name}", json={"data": data})
    if started.status_code != 200:
        return f"refused {started.status_code}", started.text
    event = started.json()["event_id"]
    with client.stream("GET", f"{API}/call/{name}/{event}") as answer:
        kind = ""
        for line in answer.iter_lines():
            if line.startswith("event:"):
                kind = line.split(":", 1)[1].strip()
            if line.startswith("data:") and kind in ("error", "complete"):
                return kind, line.split(":", 1)[1].strip()
    return "ended", ""


def compare(**changes):
    values = {
        "prompt": "a red circle",
        "method": "dense",
        "seed": 1,
        "steps": 1,
        "guidance": 3.0,
        "width": 64,
        "height": 64,
    }
    return list({**values, **changes}.values())


def picture(path, **more):
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **more}


def upload(client, name, data, kind="image/png"):
    return client.post(f"{API}/upload", files={"files": (name, data, kind)})


def png():
    out = BytesIO()
    Image.new("RGB", (64, 64), "red").save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        str(Path(mmattn.__file__).resolve()),
        "%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "../../../../etc/passwd",
        "C:\\Windows\\win.ini",
        "/proc/self/environ",
        "/ETC/passwd",
    ],
)
def test_files_outside_are_not_served(path, client):
    answer = client.get(f"{API}/file={path}")
    assert answer.status_code in (403, 404) and "root:" not in answer.text


def test_no_request_is_made_for_a_visitor(client, canary):
    address, hits = canary
    for place in (f"{API}/file={address}/x", f"/proxy={address}/x", f"{API}/proxy={address}/x"):
        assert client.get(place).status_code in (400, 403, 404)
    for given in (picture(f"{address}/a.png"), picture(None, url=f"{address}/a.png")):
        kind, text = call(client, "classify", [given, "dense", 3])
        assert kind != "complete" and address not in text
    assert not hits


@pytest.mark.parametrize("path", ["/etc/passwd", "../../etc/passwd", "/proc/self/environ", ""])
def test_files_of_the_machine_are_no_pictures(path, client):
    kind, text = call(client, "classify", [picture(path), "dense", 3])
    assert kind != "complete" and "root:" not in text and "passwd" not in text


def test_text_in_place_of_a_file_is_refused(client):
    kind, text = call(client, "classify", [picture(None, url="data:image/eps;base64,JSE="), "", 3])
    assert kind != "complete" and "Traceback" not in text


@pytest.mark.parametrize(
    "name", ["page.html", "picture.svg", "run.js", "model.pt", "clip.gif", "noname", "a.png.html"]
)
def test_other_uploads_are_refused(name, client, folder):
    before = set(folder.rglob("*"))
    assert upload(client, name, png()).status_code == 415
    assert set(folder.rglob("*")) == before


def test_names_of_uploads_stay_inside(client, folder):
    answer = upload(client, "../../../../evil.png", png())
    assert answer.status_code == 200
    stored = Path(answer.json()[0]).resolve()
    assert stored.is_relative_to(folder) and stored.name == "evil.png"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_sizes_are_bounded(client):
    assert upload(client, "a.png", bytes(limits.UPLOAD_BYTES + 1024)).status_code == 413
    flood = bytes(limits.FILES * limits.UPLOAD_BYTES + guarding.BODY_BYTES + 1)
    assert upload(client, "a.png", flood).status_code == 413
    text = {"data": compare(prompt="x" * guarding.BODY_BYTES)}
    assert client.post(f"{API}/call/compare", json=text).status_code == 413


def test_bombs_are_not_unpacked(client):
    stored = upload(client, "bomb.png", png_header(30_000, 30_000)).json()[0]
    start = time.perf_counter()
    kind, text = call(client, "classify", [picture(stored), "dense", 3])
    assert kind == "error" and "too large" in text
    assert time.perf_counter() - start < 5


def test_disguised_uploads_are_not_pictures(client):
    stored = upload(client, "page.png", b"<html><script>alert(1)</script></html>").json()[0]
    kind, text = call(client, "vlm_answer", [picture(stored), "what ?", "dense", 1, 4, ""])
    assert kind == "error" and "PNG, JPEG or WebP" in text
    served = client.get(f"{API}/file={stored}")
    assert served.headers["x-content-type-options"] == "nosniff"
    assert "html" not in served.headers["content-type"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt": "x" * 10_000}, "600 characters"),
        ({"prompt": ""}, "empty"),
        ({"steps": 9999}, ""),
        ({"steps": 2.5}, ""),
        ({"seed": -4}, ""),
        ({"guidance": 1e9}, ""),
        ({"method": "../../recipe.toml"}, "Recipe files"),
        ({"method": "vmobba"}, "vmoba"),
        ({"method": "vmoba:" + "x" * 999}, "300 characters"),
        ({"method": "vmoba+vmoba"}, "vmoba"),
        ({"seed": "DROP TABLE"}, ""),
    ],
)
def test_values_are_checked_behind_the_page(change, says, client):
    kind, text = call(client, "compare", compare(**change))
    assert kind != "complete" and says in text
    for leak in ("Traceback", "/home", "site-packages", str(Path(mmattn.__file__).parent)):
        assert leak not in text


def test_failures_inside_stay_inside(client, models, monkeypatch):
    secret = "/srv/private/weights.safetensors"

    def broken(*args, **kwargs):
        raise RuntimeError(secret)

    monkeypatch.setattr("mmattn_demos.drawing.pair", broken)
    kind, text = call(client, "compare", compare())
    assert kind == "error" and secret not in text and "log has details" in text


def test_the_queue_is_bounded(folder):
    import gradio as gr
    from mmattn_demos import serving

    gate, done = threading.Event(), []

    def job():
        gate.wait(20)
        done.append(1)
        return "done"

    with gr.Blocks(analytics_enabled=False) as blocks:
        text = gr.Textbox()
        gr.Button().click(job, None, text, api_name="job", concurrency_limit=1)
    address = serving.serve(blocks, wait=False)
    try:
        with httpx.Client(base_url=address) as client:
            codes = [
                client.post(f"{API}/call/job", json={"data": []}).status_code
                for _ in range(serving.QUEUE + 8)
            ]
            # Some wait, some run, the others are told that the queue is full.
            assert codes[0] == 200 and codes[-1] == 503
            assert serving.QUEUE <= codes.count(200) <= serving.QUEUE + 2
            gate.set()
            deadline = time.monotonic() + 20
            while len(done) < codes.count(200) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert len(done) == codes.count(200)
            assert client.post(f"{API}/call/job", json={"data": []}).status_code == 200
    finally:
        gate.set()
        blocks.close()


def test_only_named_endpoints_are_open(client):
    named = client.get(f"{API}/info").json()["named_endpoints"]
    assert set(named) == {
        *("/generate", "/compare", "/imageset", "/video"),
        *("/vlm_answer", "/classify", "/tokens", "/bench"),
    }
    assert client.post(f"{API}/run/compare", json={"data": compare()}).status_code in (401, 404)
    for place in ("/docs", "/redoc", "/openapi.json", "/monitoring", f"{API}/monitoring"):
        assert client.get(place).status_code in (403, 404), place


def test_browsers_are_told_to_stay_here(client):
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "http" not in policy
    assert page.headers["x-frame-options"] == "SAMEORIGIN"
    evil = client.get("/config", headers={"origin": "http://evil.example"})
    assert evil.headers.get("access-control-allow-origin") != "http://evil.example"


def test_broken_bodies_do_not_break_the_server(client):
    bodies = [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"data": null}',
        b'{"data": {}}',
        b"\xff\xfe",
        b"[" * 5000,
    ]
    bodies += [json.dumps({"data": [None] * n}).encode() for n in (0, 1, 7, 40)]
    bodies += [json.dumps({"data": [value] * 7}).encode() for value in ([], {}, 1e308, "\ud800")]
    threads = threading.active_count()
    for name in ("compare", "classify", "bench", "tokens", "no_such_name"):
        for body in bodies:
            answer = client.post(
                f"{API}/call/{name}", content=body, headers={"content-type": "application/json"}
            )
            assert answer.status_code in (200, 400, 404, 422, 503), body[:60]
            assert "Traceback" not in answer.text
    assert client.get("/config").status_code == 200
    assert threading.active_count() < threads + 20
