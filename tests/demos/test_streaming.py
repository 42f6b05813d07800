"""Jobs in threads: order, errors, stopping, and the model being free again afterwards."""

from __future__ import annotations

import threading
import time

import pytest
from mmattn_demos import drawing
from mmattn_demos.presets import chosen
from mmattn_demos.streaming import Done, StoppedError, Stops, Update, stream

import mmattn


def run(work, lock=None, stops=None):
    return stream(work, lock=lock or threading.Lock(), stops=stops or Stops(), visitor="v")


def test_updates_then_the_result():
    def work(tell):
        tell(Update("one"))
        tell(Update("two"))
        return 3

    assert list(run(work)) == [Update("one"), Update("two"), Done(3)]


def test_errors_come_through_and_the_lock_is_free():
    lock = threading.Lock()

    def work(tell):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        list(run(work, lock))
    assert lock.acquire(timeout=2)


def test_cancel_stops_between_steps_and_detaches(models):
    loaded, stops, lock = models.get("t2i"), Stops(), threading.Lock()
    ask = drawing.Ask("a red circle", chosen("vmoba:topk=0.5", "t2i"), 1, 50, 3.0)
    seen = []
    with pytest.raises(StoppedError):
        for item in run(lambda tell: drawing.single(loaded, ask, tell, methods=True), lock, stops):
            seen.append(item.text)
            if "step 2" in item.text:
                assert stops.stop("nobody else") == 0
                assert stops.stop("v") == 1
    assert not any("step 40" in text for text in seen)
    assert lock.acquire(timeout=5) and stops.stop("v") == 0
    mmattn.attach(loaded.target, "identity").detach()  # raises if something is still attached


def test_a_reader_that_leaves_stops_the_work():
    told, lock = [], threading.Lock()

    def work(tell):
        for i in range(1000):
            tell(Update(str(i)))
            told.append(i)
            time.sleep(0.002)

    items = run(work, lock)
    next(items)
    items.close()
    assert lock.acquire(timeout=2)
    assert len(told) < 900


def test_one_job_at_a_time():
    lock, inside, most = threading.Lock(), [0], [0]

    def work(tell):
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.02)
        inside[0] -= 1

    threads = [threading.Thread(target=lambda: list(run(work, lock))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1
