"""The Ray engine: actors that die, rows that cannot be made, stops; the files of the local engine always."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from mmattn.batch import ray_actor, ray_cluster, ray_engine
from mmattn.batch.ledger import Ledger, OutputError, Record, read_records
from mmattn.batch.limits import sha256_of
from mmattn.batch.local import Rules, Stop
from mmattn.batch.models import Models, Source
from mmattn.batch.worker import Options, Worker
from mmattn.errors import ConfigError, MissingExtraError, ModelLoadError
from mmattn.loading import Loaded

PRINTS = {"image": "fake-model", "video": "fake-model"}
HERE = sys.modules[__name__]

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="the ray engine needs ray"
)


@dataclass
class Loader:
    """Loads a fake pipeline, and says in files which process did and which process draws."""

    pipe: object
    folder: Path

    def __call__(self, source):
        put(self.folder / "loads", os.getpid())
        return Loaded(source.kind, Logged(self.pipe, self.folder))


@dataclass
class Logged:
    pipe: object
    folder: Path

    @property
    def vae(self):
        return self.pipe.vae

    def __call__(
        self,
        prompt,
        num_inference_steps,
        generator,
        output_type,
        width=16,
        height=16,
        negative_prompt=None,
        guidance_scale=None,
        callback_on_step_end=None,
        callback_on_step_end_tensor_inputs=None,
    ):
        put(self.folder / "calls", os.getpid())
        if any("deadly" in text for text in prompt):
            os.kill(os.getpid(), signal.SIGKILL)
        return self.pipe(
            prompt,
            num_inference_steps,
            generator,
            output_type,
            width,
            height,
            callback_on_step_end=callback_on_step_end,
        )


def put(path, pid):
    with path.open("a") as stream:
        stream.write(f"{pid}\n")


def pids(path):
    return [int(line) for line in path.read_text().split()]


class Ray:
    """Runs job files of a `Bench` with the Ray engine."""

    def __init__(self, bench):
        from ray import cloudpickle

        # Modules that pytest loaded cannot be imported by the actors.
        for module in (HERE, sys.modules[type(bench).__module__]):
            cloudpickle.register_pickle_by_value(module)
        self.bench = bench

    def run(self, path, *, rules=None, stop=None, watch=None):
        bench, folder = self.bench, self.bench.folder / "ray"
        kinds = {"image": "t2i", "video": "t2v"}
        sources = {row: Source("fake", kind) for row, kind in kinds.items()}
        models = Models(sources, Loader(bench.pipe, bench.folder))
        more = {} if stop is None else {"stop": stop}
        more |= {} if watch is None else {"watch": watch}
        with Ledger(folder) as ledger:
            run = ray_engine.RayRun(
                bench.jobs(path),
                PRINTS,
                ledger,
                Worker(models, Options(folder)),
                rules or Rules(),
                actors=2,
                **more,
            )
            return run()


@pytest.fixture
def ray_bench(bench):
    bench.pipe.delay = 0.05
    torch.set_num_threads(1)
    return Ray(bench)


def rows(count):
    return [{"id": f"item-{i}", "prompt": f"picture number {i}"} for i in range(count)]


def listening():
    """Addresses at which processes started from here accept connections."""
    import psutil

    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            connections = process.net_connections("inet")
        except psutil.Error:
            continue
        found |= {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
    return found


@needs_ray
def test_an_actor_killed_in_the_middle(ray_bench):
    bench = ray_bench.bench
    path = bench.write([*rows(30), {"id": "bad", "prompt": "poison"}])
    killed, addresses = [], set()

    def watch(summary):
        if summary.ok >= 8 and not killed:
            addresses.update(listening())
            killed.append(pids(bench.folder / "calls")[-1])
            os.kill(killed[0], signal.SIGKILL)

    summary = ray_bench.run(path, watch=watch)
    assert killed and killed[0] != os.getpid()
    assert (summary.ok, summary.failed, summary.stopped, summary.exit_code) == (30, 1, None, 3)
    assert addresses and addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}

    records = bench.records("ray")
    statuses = Counter((record["id"], record["status"]) for record in records)
    assert statuses == {**{(row["id"], "ok"): 1 for row in rows(30)}, ("bad", "failed"): 1}
    bench.run(path, "local")
    assert bench.hashes("ray") == bench.hashes("local")
    for record in records:
        if record["status"] == "ok":
            assert sha256_of(bench.folder / "ray" / record["file"]) == record["sha256"]

    loads, calls = pids(bench.folder / "loads"), set(pids(bench.folder / "calls"))
    loads = [pid for pid in loads if pid != os.getpid()]
    assert len(loads) == len(set(loads)), "a model is loaded once per process"
    assert len(set(loads) & calls) >= 3, "two actors, and one in place of the killed one"
    assert not list((bench.folder / "ray").glob(".ray-*"))


@needs_ray
def test_nothing_to_do_starts_nothing(ray_bench, monkeypatch):
    path = ray_bench.bench.write(rows(2))
    ray_bench.bench.run(path, "ray")
    monkeypatch.setattr(ray_engine, "Cluster", None)
    assert ray_bench.run(path).before == 2


@needs_ray
@pytest.mark.slow
def test_a_row_that_kills_its_process(ray_bench):
    bench = ray_bench.bench
    path = bench.write([*rows(6), {"id": "bomb", "prompt": "deadly"}, *rows(9)[6:]])
    summary = ray_bench.run(path)
    assert (summary.ok, summary.failed) == (9, 1)
    bench.write(rows(9), "plain.jsonl")
    bench.run(bench.folder / "plain.jsonl", "local")
    assert bench.hashes("ray") == bench.hashes("local")
    (failed,) = [r for r in bench.records("ray") if r["status"] == "failed"]
    assert failed["id"] == "bomb" and failed["error"]["class"] == "ActorDied"


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM", "fail_fast"])
def test_stop_and_go_on(ray_bench, how):
    bench = ray_bench.bench
    bench.pipe.delay = 0.2
    path = bench.write([{"id": "bad", "prompt": "poison"}, *rows(40)])

    def watch(summary):
        if how == "SIGTERM" and summary.ok == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with Stop() as stop:
        summary = ray_bench.run(
            path, stop=stop, watch=watch, rules=Rules(fail_fast=how == "fail_fast")
        )
    assert summary.exit_code == (143 if how == "SIGTERM" else 3)
    assert 0 < summary.ok < 40
    assert not {r["status"] for r in bench.records("ray")} - {"ok", "skipped", "failed"}
    ray_bench.run(path)
    bench.run(path, "local")
    assert len(bench.hashes("ray")) == 40 and bench.hashes("ray") == bench.hashes("local")
    ok = Counter(r["id"] for r in bench.records("ray") if r["status"] == "ok")
    assert set(ok.values()) == {1}, "what was made before the stop is not made again"


@needs_ray
@pytest.mark.slow
def test_more_actors_than_cores(ray_bench):
    import ray

    path = ray_bench.bench.write(rows(2))
    ray.init(address="local", num_cpus=1, include_dashboard=False, _node_ip_address="127.0.0.1")
    try:
        with pytest.raises(ConfigError, match="2 actors were asked for, and Ray sees 1 CPU cores"):
            ray_bench.run(path)
        assert ray.is_initialized(), "a cluster of the caller's stays up"
    finally:
        ray.shutdown()


def test_without_ray(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mmattn\[ray\]'"):
        ray_cluster.require()


@needs_ray
def test_a_numbered_gpu_is_refused():
    with pytest.raises(ConfigError, match="the device is cuda:1; say --device cuda"):
        ray_cluster.require("cuda:1")


@needs_ray
def test_the_embedded_model_on_the_command_line(tmp_path):
    from mmattn.cli import app

    jobs = tmp_path / "jobs.jsonl"
    prompts = ["a red circle on a white background", "a blue square"]
    jobs.write_text(
        "".join(json.dumps({"prompt": p, "method": "identity"}) + "\n" for p in prompts)
    )
    common = ["--model", "t2i", "--threads", "1", "-q"]
    hashes = {}
    # Ray gets the files of the local engine instead of the rows.
    more = {
        "local": [str(jobs), "--steps", "1"],
        "ray": [str(tmp_path / "local"), "--engine", "ray", "--actors", "1"],
    }
    for engine, given in more.items():
        out = tmp_path / engine
        done = CliRunner().invoke(app, ["batch", *given, *common, "--out", str(out)])
        assert done.exit_code == 0, done.output
        hashes[engine] = {r["id"]: (r["status"], r["sha256"]) for r in read_records(out)}
        assert (out / "index.html").is_file()
    assert len(hashes["ray"]) == 2 and hashes["ray"] == hashes["local"]


def test_actors_need_the_ray_engine(tmp_path):
    from mmattn.cli import app

    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text('{"prompt": "a red circle"}\n')
    done = CliRunner().invoke(app, ["batch", str(jobs), "--actors", "2"])
    assert done.exit_code == 2 and "--actors belongs to --engine ray" in done.output
    done = CliRunner().invoke(app, ["batch", str(jobs), "--engine", "dask"])
    assert done.exit_code == 2 and "'dask'" in done.output


def started(process, manifest, seen):
    """Waits for a few records; `seen` gets all processes that were started on the way."""
    import psutil

    parent, deadline = psutil.Process(process.pid), time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        seen.update(parent.children(recursive=True))
        if manifest.exists() and manifest.read_bytes().count(b"\n") >= 3:
            return
        time.sleep(0.05)
    raise AssertionError("no records came")


@needs_ray
@pytest.mark.parametrize(
    ("signals", "everyone", "code"),
    [
        ([signal.SIGINT], True, 130),
        pytest.param([signal.SIGINT] * 2, True, 130, marks=pytest.mark.slow),
        pytest.param([signal.SIGTERM], False, 143, marks=pytest.mark.slow),
        pytest.param([signal.SIGTERM], True, 143, marks=pytest.mark.slow),
    ],
    ids=["once", "twice", "sigterm", "sigterm-to-the-group"],
)
def test_signals_end_the_command_and_all_that_ray_started(tmp_path, signals, everyone, code):
    import psutil

    (tmp_path / "jobs.jsonl").write_text('{"prompt": "a red circle", "n": 1000}\n')
    command = [
        sys.executable,
        "-m",
        "mmattn.cli",
        "batch",
        "jobs.jsonl",
        "--out",
        "o",
        "--steps",
        "1",
    ]
    with (tmp_path / "log").open("w") as log:
        child = subprocess.Popen(
            [*command, "--engine", "ray", "--actors", "2"],
            cwd=tmp_path,
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    manifest, seen = tmp_path / "o" / "manifest.jsonl", set()
    try:
        started(child, manifest, seen)
        assert len(seen) > 4
        for number in signals:  # a terminal sends Ctrl-C to all of a command's processes
            (os.killpg if everyone else os.kill)(child.pid, number)
            time.sleep(0.3)
        assert child.wait(60) == code
        deadline = time.monotonic() + 1  # what was killed needs a moment to be gone
        while (left := list(filter(ray_cluster._runs, seen))) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not left
    finally:
        for process in [child, *seen]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    said = (tmp_path / "log").read_text()
    assert "Traceback" not in said
    assert (
        "mmattn: interrupted" if len(signals) == 2 else "the same command goes on from here"
    ) in said
    records = list(read_records(tmp_path / "o"))
    assert manifest.read_bytes().endswith(b"\n") and manifest.read_bytes().count(b"\n") == len(
        records
    )
    ok = [r for r in records if r["status"] == "ok"]
    assert 3 <= len(ok) < 1000 and {r["status"] for r in records} <= {"ok", "skipped"}
    for record in ok:
        assert sha256_of(tmp_path / "o" / record["file"]) == record["sha256"]
    files = {p.stem for p in (tmp_path / "o").rglob("*.png")}
    if len(signals) == 1:
        assert files == {r["id"] for r in ok}, "what was running has been finished and recorded"
        assert not list((tmp_path / "o").rglob("*.tmp"))
    else:
        assert files >= {r["id"] for r in ok}


def by_hand(bench, answer):
    """A run whose actors are played by `answer`, from items to a JSON-ready answer or None."""

    class Played(ray_engine.RayRun):
        def _results(self, chosen):
            for number, part in enumerate(chosen):
                found = answer(part, self._notes)
                if found is not None:
                    yield {"part": number, "answer": json.dumps(found)}

    models = Models({"image": Source("fake", "t2i")}, None)
    ledger = Ledger(bench.folder / "ray")
    path = bench.write(rows(4))
    worker = Worker(models, Options(ledger.out))
    run = Played(bench.jobs(path), PRINTS, ledger, worker)
    run._cluster = SimpleNamespace(size=1, lost=False, killed=False, any_runs=bool)
    return run


@needs_ray
def test_a_part_without_an_answer_fails_alone(bench):
    def answer(part, notes):
        if part[0].id == "item-2":
            return None
        return {"records": [{"id": i.id, "status": "ok", "key": i.key} for i in part]}

    run = by_hand(bench, answer)
    with run.ledger:
        summary = run()
    assert (summary.ok, summary.failed, summary.exit_code) == (3, 1, 3)
    (failed,) = [r for r in bench.records("ray") if r["status"] == "failed"]
    assert failed["id"] == "item-2" and failed["error"]["class"] == "NoAnswer"


@needs_ray
@pytest.mark.parametrize("error", [OutputError, ModelLoadError])
def test_what_no_actor_can_do_ends_the_run(bench, error):
    asked = []

    def answer(part, notes):
        asked.append(notes)
        return {"stop": error.__name__, "message": "no space left"}

    run = by_hand(bench, answer)
    with run.ledger, pytest.raises(error, match="no space left"):
        run()
    assert not asked[0].stopped() and not bench.records("ray"), "its notes are gone"


def all_ok(part):
    return {"records": [{"id": i.id, "status": "ok", "key": i.key} for i in part]}


@needs_ray
def test_a_stop_waits_for_parts_that_were_begun_and_for_no_others(bench):
    asked = []

    def answer(part, notes):
        asked.append(part[0].id)
        if len(asked) == 1:
            notes.begin("2")
            run.stop.reason = "SIGTERM"
        time.sleep(0.1)
        return all_ok(part)

    run = by_hand(bench, answer)
    run.jobs = bench.jobs(bench.write(rows(40)))
    with run.ledger:
        summary = run()
    assert summary.exit_code == 143 and summary.ok == 3, "the third was begun"
    assert len(asked) < 8 and len(bench.records("ray")) == 3


@needs_ray
@pytest.mark.parametrize(("reason", "code"), [(None, 3), ("SIGTERM", 143)])
def test_ray_that_ends_before_the_run(bench, reason, code):
    def answer(part, notes):
        if part[0].id == "item-1":
            run._cluster.lost, run.stop.reason = True, reason
            notes.begin("1")
            time.sleep(0.5)
            return None
        return all_ok(part)

    run = by_hand(bench, answer)
    with run.ledger:
        summary = run()
    assert (summary.ok, summary.failed, summary.exit_code) == (1, 0, code)
    assert summary.stopped == (reason or "the processes of Ray have ended")
    assert not list((bench.folder / "ray").glob(".ray-*"))


@needs_ray
def test_what_breaks_inside_of_ray_is_not_lost(bench):
    def answer(part, notes):
        raise ZeroDivisionError("inside")

    run = by_hand(bench, answer)
    with run.ledger, pytest.raises(ZeroDivisionError, match="inside"):
        run()


def test_tries_are_counted_between_processes(bench):
    class Deadly:
        def run(self, items):
            if any(item.id == "item-1" for item in items):
                raise SystemExit  # stands for a process that dies
            return [Record(item.id, "ok", item.key) for item in items]

    notes = ray_actor.Notes(bench.folder, "1.test")
    items = bench.items(bench.write(rows(3)))

    def attempt(part):
        actor = object.__new__(ray_actor.Actor)
        actor.worker, actor.notes = Deadly(), notes
        try:
            return actor._make(part, "7")
        except SystemExit:
            return None

    tried = []
    while not tried or tried[-1] is None:
        tried.append(attempt(items))
    assert len(tried) == 2 * ray_actor.TRIES + 1  # together, then alone
    assert [record.status for record in tried[-1]] == ["ok", "failed", "ok"]
    assert tried[-1][1].error["class"] == "ActorDied"
    assert attempt(items[:1]) is not None
    notes.clear()
    assert not list(bench.folder.glob(".ray-*"))
