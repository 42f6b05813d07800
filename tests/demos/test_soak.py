"""Many random requests, then many visitors at once: the server stays up and nothing gets stuck."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest
from test_attacks import API, call, picture, png, upload

pytestmark = pytest.mark.slow

GROUPS = {
    "image": ("compare", "generate"),
    "imageset": ("imageset",),
    "video": ("video",),
    "vlm": ("vlm_answer",),
    "tokens": ("tokens", "classify"),
    "bench": ("bench",),
}
BODIES = 500
VISITORS = 8
SECONDS = 60


def resident():
    """Megabytes that this process, which holds the server, has in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def value(source, depth=0):
    """One value that some endpoint could be sent."""
    plain = [
        None,
        True,
        -1,
        0,
        1,
        10**30,
        2.5,
        float("1e308"),
        "",
        "dense",
        "vmoba",
        "a red circle",
        "../../etc/passwd",
        "x" * 5000,
        "\x00\ud800",
        "<script>alert(1)</script>",
        {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},
        {"url": "http://127.0.0.1:9/x", "meta": {"_type": "gradio.FileData"}},
    ]
    kind = source.random()
    if depth < 3 and kind < 0.1:
        return [value(source, depth + 1) for _ in range(source.randrange(4))]
    if depth < 3 and kind < 0.2:
        return {str(value(source, 3))[:20]: value(source, depth + 1)}
    return source.choice(plain)


def body(source):
    data = {"data": [value(source) for _ in range(source.choice([0, 1, 3, 5, 7, 8, 9, 12]))]}
    if source.random() < 0.2:
        data["data"] = value(source)
    if source.random() < 0.2:
        data[source.choice(["event_data", "fn_index", "session_hash", "trigger_id"])] = value(
            source
        )
    return json.dumps(data).encode()


def lively(client):
    """A well-formed request is answered, at the latest once the queue has drained."""
    stored = upload(client, "a.png", png()).json()[0]
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        kind, _ = call(client, "classify", [picture(stored), "dense", 3])
        if kind == "complete":
            return True
        assert kind == "refused 503"
        time.sleep(0.2)
    return False


@pytest.mark.parametrize("group", GROUPS)
def test_random_bodies(group, server):
    source = random.Random(f"bodies {group}")
    codes = Counter()
    with httpx.Client(base_url=server, timeout=20) as client:
        assert lively(client)
        for number in range(BODIES):
            if number == BODIES // 2:
                # What the first requests load and cache stays; only further growth would be a leak.
                before = resident()
            name = GROUPS[group][number % len(GROUPS[group])]
            answer = client.post(
                f"{API}/call/{name}",
                content=body(source),
                headers={"content-type": "application/json"},
            )
            codes[answer.status_code] += 1
            assert answer.status_code < 500 or answer.status_code == 503
            assert "Traceback" not in answer.text and "root:" not in answer.text
        assert lively(client)
    print(f"{group}: {dict(codes)}, memory {resident() - before:+.0f} MB")
    assert codes[200] > 0 and resident() - before < 50


def test_many_visitors(server):
    ends, waits, lock = Counter(), [], threading.Lock()
    stop = time.monotonic() + SECONDS

    def visit():
        with httpx.Client(base_url=server, timeout=20) as client:
            stored = upload(client, "a.png", png()).json()[0]
            while time.monotonic() < stop:
                start = time.perf_counter()
                kind, _ = call(client, "classify", [picture(stored), "dense", 3])
                with lock:
                    ends[kind] += 1
                    waits.append(time.perf_counter() - start)

    with httpx.Client(base_url=server, timeout=20) as client:
        assert lively(client)
        before = resident()
        threads = [threading.Thread(target=visit, daemon=True) for _ in range(VISITORS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS + 60)
        assert not any(thread.is_alive() for thread in threads)
        start = time.perf_counter()
        assert lively(client) and time.perf_counter() - start < 5
    waits.sort()
    print(
        f"{dict(ends)}, median {waits[len(waits) // 2]:.2f} s, longest {waits[-1]:.2f} s, "
        f"memory {resident() - before:+.0f} MB"
    )
    # The queue holds more than the visitors, so that nobody is sent away.
    assert set(ends) == {"complete"} and ends["complete"] > VISITORS
