"""Files that were made before, made again: from their metadata, with changes on top, under the same ids."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import time

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mmattn.batch import remaking
from mmattn.batch.inspecting import inspect_file
from mmattn.batch.items import seed_of
from mmattn.batch.jobs import BadRows, Jobs, Shard
from mmattn.batch.ledger import Ledger
from mmattn.batch.local import Run
from mmattn.batch.metadata import parse_parameters
from mmattn.batch.remaking import FileJobs, jobs_from
from mmattn.batch.worker import Options, Worker
from mmattn.errors import ConfigError

PRINTS = {"image": "fake-model", "video": "fake-model"}
ROWS = [
    {"id": "plain", "prompt": "größer <b>", "n": 3},
    {"id": "full", "prompt": "x", "negative_prompt": "y", "guidance": 2, "width": 24, "seed": 7},
    {"id": "clip", "prompt": "z", "num_frames": 3, "fps": 4},
    {"prompt": "without an id"},
]


@pytest.fixture
def made(bench):
    """The folder of a run over `ROWS`."""
    bench.run(bench.write(ROWS), "first")
    assert len(bench.hashes("first")) == 6
    return bench.folder / "first"


def jobs(paths, defaults=None, **more):
    paths = paths if isinstance(paths, list) else [paths]
    return FileJobs(
        paths, defaults, **{"named": True, "kinds": dict.fromkeys(PRINTS, False), **more}
    )


def items(paths, defaults=None, **more):
    found = jobs(paths, defaults, **more)
    found.check()
    return list(found.items(PRINTS))


def make(bench, chosen, out, shard=None, **more):
    """One run over files with the local engine; methods are left out, the pipeline is a fake."""
    chosen.check()
    with Ledger(bench.folder / out, shard) as ledger:
        worker = Worker(bench.models(), Options(bench.folder / out))
        run = Run(chosen, PRINTS, ledger, worker, shard=shard, **more)
        with worker:
            return run()


def text_png(path, **texts):
    info = PngInfo()
    for key, text in texts.items():
        info.add_itxt(key, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path, pnginfo=info)
    return path


def test_without_changes_every_file_is_the_same_to_the_byte(bench, made):
    summary = make(bench, jobs(made), "again")
    assert (summary.planned, summary.ok, summary.exit_code) == (6, 6, 0)
    assert bench.hashes("again") == bench.hashes("first")
    for name in ("images", "videos"):
        first = sorted(p.relative_to(made) for p in (made / name).rglob("*") if p.is_file())
        again = bench.folder / "again"
        assert first and all((again / p).read_bytes() == (made / p).read_bytes() for p in first)
    keys = {i.id: i.key for i in bench.items(bench.folder / "jobs.jsonl")}
    assert {i.id: i.key for i in items(made)} == keys


def test_options_win_over_files_and_seeds_and_ids_stay(bench, made):
    before = {i.id: i for i in items(made)}
    changes = {"steps": 5, "negative_prompt": "dull", "fps": 2, "seed": 99, "method": "identity"}
    after = {i.id: i for i in items(made, changes)}
    assert list(after) == list(before) and len(after) == 6
    for name, item in after.items():
        assert item.seed == before[name].seed and item.file == before[name].file
        assert item.params["steps"] == 5 and item.params["negative_prompt"] == "dull"
        assert item.params["prompt"] == before[name].params["prompt"]
        assert item.label == "identity" and item.key != before[name].key
    assert (after["full"].params["guidance"], after["full"].params["width"]) == (2, 24)
    assert after["clip"].params["fps"] == 2 and "fps" not in after["full"].params
    assert after["full"].seed == 7 and after["plain-1"].seed == seed_of("plain-1")
    # In a job file the row wins.
    row = Jobs(bench.folder / "jobs.jsonl", {"guidance": 9.0, "seed": 99})
    row.check()
    full = next(i for i in row.items(PRINTS) if i.id == "full")
    assert (full.params["guidance"], full.seed) == (2, 7)

    make(bench, jobs(made, {"steps": 3}), "more")
    assert bench.hashes("more").keys() == bench.hashes("first").keys()
    assert not set(bench.hashes("more").values()) & set(bench.hashes("first").values())
    (record,) = [r for r in bench.records("more") if r["id"] == "full"]
    meta = inspect_file(bench.folder / "more" / record["file"])["mmattn"]
    assert (meta["steps"], meta["seed"], meta["guidance"]) == (3, 7, 2)


def test_methods_of_files_stay_or_are_replaced_or_changed(bench):
    rows = [{"id": "t", "prompt": "x", "method": "tome:r=4"}, {"id": "d", "prompt": "x"}]
    for item in bench.items(bench.write(rows)):
        meta = {"schema": 1, "id": item.id, "kind": "image", "seed": 3, "fingerprint": "m"}
        meta |= {**item.params, "model": "t2i", "methods": list(item.methods), "method": "any"}
        text_png(bench.folder / "in" / f"{item.id}.png", mmattn=json.dumps(meta))
    folder = bench.folder / "in"

    def labels(*given, **more):
        return {i.id: i.label for i in items(folder, *given, **more)}

    assert labels() == {"t": "tome r=4", "d": "dense"}
    assert labels({"method": "dense"}) == {"t": "dense", "d": "dense"}
    assert labels({"method": "identity"}) == {"t": "identity", "d": "identity"}
    (changed,) = items(folder / "t.png", changes=["tome.r=6"])
    assert changed.label == "tome r=6" and changed.methods[0]["r"] == 6
    with pytest.raises(BadRows, match=r"d\.png: --set r: no chosen method has that setting"):
        jobs(folder, changes=["r=6"]).check()


def test_order_is_that_of_names_and_what_lies_beside_results_is_left_alone(bench, made):
    chosen = jobs(made)
    chosen.check()
    walked = [row.where for row in chosen._read()]
    assert walked == sorted(walked) and len(walked) == 6
    files = [p for p in made.rglob("*") if p.is_file()]
    assert len(files) > 9, "the manifest, pages, the sidecar and the lock are there too"
    # The same content in folders that were filled in another order.
    chosen = [p for p in files if p.suffix in (".png", ".mp4")]
    for seed in (1, 2):
        random.Random(seed).shuffle(chosen)
        for path in chosen:
            target = bench.folder / f"copy{seed}" / path.relative_to(made)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    one, two = (items(bench.folder / f"copy{seed}") for seed in (1, 2))
    assert [(i.id, i.row) for i in one] == [(i.id, i.row) for i in two]
    # Several folders come one after the other.
    parts = [made / "videos", made / "images"]
    assert [i.kind for i in items(parts)] == ["video"] + ["image"] * 5
    (made / "run.json").write_text("{}")
    set_ = made / "sets" / "s.panels"
    set_.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(set_ / "1.png")
    with pytest.raises(BadRows, match=r"1 file cannot be run\n.*s\.panels/1\.png: it carries no"):
        jobs(made).check()
    shutil.copy(next(made.rglob("full.png")), made / "sets" / "s.png")
    next(made.rglob("full.png")).unlink()
    assert len(items(made)) == 6


def test_a_run_that_was_stopped_goes_on(bench, made):
    class Twice:
        reason, asked = "SIGTERM", 0

        def __call__(self):
            self.asked += 1
            return self.asked > 2

    summary = make(bench, jobs(made, {"steps": 3}), "new", stop=Twice())
    assert (summary.ok, summary.exit_code) == (2, 143)
    summary = make(bench, jobs(made, {"steps": 3}), "new")
    assert (summary.before, summary.ok) == (2, 4)
    for index in range(2):
        make(bench, jobs(made, {"steps": 3}), "shards", shard=Shard(index, 2))
    assert bench.hashes("shards") == bench.hashes("new") and len(bench.hashes("new")) == 6
    # Another option is other content: everything is made again, under the same names.
    summary = make(bench, jobs(made, {"steps": 4}), "new")
    assert (summary.before, summary.changed, summary.ok) == (0, 6, 6)


def test_files_that_cannot_be_made_again_are_listed_by_name(bench, made):
    for i in range(25):
        text_png(made / f"holiday-{i:02d}.png")
    with pytest.raises(BadRows) as caught:
        jobs(made).check()
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{made}: 25 files cannot be run"
    assert lines[1] == f"{made}/holiday-00.png: it carries no metadata of mmattn batch"
    assert len(lines) == 22 and lines[-1] == "and 5 more"
    # They can be left out; damage and what only looks like ours cannot.
    chosen = jobs(made, allow_extra=True)
    assert chosen.check().skipped == 25 and len(list(chosen.items(PRINTS))) == 6
    whole = next(made.rglob("full.png"))
    (made / "torn.png").write_bytes(whole.read_bytes()[:60])
    text_png(made / "verb.png", mmattn='{"prompt": "by another verb", "seed": 1}')
    text_png(made / "future.png", mmattn='{"schema": 99}')
    (made / "photo.JPG").write_bytes(b"\xff\xd8\xff")
    (made / "notes.txt").write_text("not looked at")
    (made / "package.json").write_text('{"name": "x"}')
    (made / "twice.png").write_bytes(whole.read_bytes())
    chosen = jobs(made, allow_extra=True)
    with pytest.raises(BadRows) as caught:
        chosen.check()
    said = dict(line.split(": ", 1) for line in str(caught.value).splitlines()[1:])
    assert [name.rpartition("/")[2] for name in said] == ["future.png", "torn.png", "full.png"]
    assert "schema 1" in said[f"{made}/future.png"] and "damaged" in said[f"{made}/torn.png"]
    assert "the id 'full' is taken by a file above" in said[str(whole)]
    with pytest.raises(ConfigError, match="has no files"):
        jobs(made / "photo.JPG", allow_extra=True).check()


def test_a_file_can_ask_for_no_more_than_a_row(made):
    whole = next(made.rglob("full.png"))
    meta = inspect_file(whole)["mmattn"]
    wrong = {
        "steps must be": {"steps": 10**9},
        "seed must be": {"seed": 2**70},
        "id has": {"id": "x" * 300},
        "unknown key 'n'": {"n": 1000},
        "unknown keys ['command']": {"command": "x"},
        "are no tables": {"methods": ["recipe.toml"]},
        "unknown method": {"methods": [{"name": "os.system"}]},
        "local file": {"init_image": "http://127.0.0.1/x.png"},
        "unknown kind": {"kind": "shell"},
        "no model here makes captions": {"kind": "caption"},
    }
    for part, change in wrong.items():
        part = part.replace("keys [", "key [")
        text_png(whole, mmattn=json.dumps({**meta, **change}))
        with pytest.raises(BadRows) as caught:
            jobs(whole).check()
        assert part in str(caught.value), (part, str(caught.value))
    # What an option replaces need not be right.
    text_png(whole, mmattn=json.dumps({**meta, "steps": 10**9, "methods": [{"name": "gone"}]}))
    (item,) = items(whole, {"steps": 4, "method": "dense"})
    assert item.params["steps"] == 4 and item.methods == ()
    text_png(whole, mmattn=json.dumps({**meta, "id": "../../up"}))
    (item,) = items(whole)
    assert ".." not in item.file


def test_pictures_that_were_given_must_be_there_and_the_same(bench):
    photo = bench.folder / "photo.png"
    Image.new("RGB", (8, 8), "red").save(photo)
    rows = [{"id": "i", "prompt": "x", "init_image": "photo.png", "strength": 0.5}]
    (item,) = bench.items(bench.write(rows))
    meta = {"schema": 1, "id": "i", "kind": "image", "seed": item.seed, "fingerprint": "m"}
    meta |= {**item.params, "model": "t2i", "methods": []}
    file = text_png(bench.folder / "in" / "i.png", mmattn=json.dumps(meta))
    assert items(file)[0].key == item.key
    Image.new("RGB", (8, 8), "blue").save(photo)
    with pytest.raises(BadRows, match="a picture it was made from has changed since"):
        jobs(file).check()
    photo.unlink()
    with pytest.raises(BadRows, match="there is no picture file"):
        jobs(file).check()


def test_captions_and_sets(bench):
    Image.new("RGB", (8, 8), "red").save(bench.folder / "p.png")
    rows = [
        {"id": "c", "image": "p.png", "max_new_tokens": 4},
        {"id": "s", "panels": [{"prompt": "a red box", "image": "p.png"}, "a blue square"]},
    ]
    prints = {"caption": "m", "imageset": "m"}
    source = Jobs(bench.write(rows), {"steps": 2})
    source.check()
    folder = bench.folder / "in"
    folder.mkdir()
    for item in source.items(prints):
        meta = {"schema": 1, "id": item.id, "kind": item.kind, "seed": item.seed}
        meta |= {**item.params, "fingerprint": "m", "model": "t2i", "methods": []}
        if item.kind == "caption":
            (folder / "c.json").write_text(json.dumps({"answer": "a box", "mmattn": meta}))
        else:
            text_png(folder / "s.png", mmattn=json.dumps(meta))
    again = FileJobs([folder], {"guidance": 4.0})
    assert again.check().items == {"caption": 1, "imageset": 1}
    caption, pictures = again.items(prints)
    first = {item.id: item for item in source.items(prints)}
    assert caption.key == first["c"].key, "guidance is nothing to a caption"
    assert pictures.params == {**first["s"].params, "guidance": 4.0}


def test_models_are_those_of_the_files_or_named(bench, made):
    with pytest.raises(BadRows, match="was made with the model 'fake'; say with --model"):
        jobs(made, named=False).check()
    chosen = jobs(made)
    chosen.check()
    assert chosen.of_other_models(PRINTS) == 0
    assert chosen.of_other_models({**PRINTS, "image": "others"}) == 5


def test_what_is_read_and_what_is_written_lie_apart(bench, made):
    def refused(paths, out, part, **more):
        with pytest.raises(ConfigError, match=part):
            jobs_from(paths, out, {}, named=True, **more)

    for paths, out in (
        ([made], made),
        ([made], made / "new"),
        ([made / "images"], made),
        ([next(made.rglob("full.png"))], made),
    ):
        refused(paths, out, "one lies in the other")
    link = bench.folder / "link"
    link.symlink_to(made)
    refused([link], made, "one lies in the other")
    out, table = bench.folder / "new", bench.folder / "jobs.jsonl"
    refused([made, table], out, "one job file makes a run")
    refused([table, table], out, "one job file makes a run")
    refused([made, bench.folder / "none"], out, "no file or folder at")
    refused([table], out, "no -m is given", changes=["r=3"])
    assert type(jobs_from([table], out, {}, named=False)) is Jobs
    assert type(jobs_from([made], out, {}, named=False)) is FileJobs
    with pytest.raises(ConfigError, match="no job file at"):
        jobs_from([bench.folder / "none.png"], out, {}, named=False).check()


def test_there_is_a_limit(made, monkeypatch):
    monkeypatch.setattr(remaking, "FILES", 5)
    with pytest.raises(ConfigError, match="more than 5 files"):
        jobs(made).check()


# -- the text of other programs -------------------------------------------------------------------------

OTHERS = """a castle, (sharp:1.2)
on a hill
Negative prompt: blurry,
ugly
Steps: 28, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 4093011, Size: 512x768, \
Model hash: abc, Model: dreams_v8, ControlNet 0: "Steps: 3, Seed: 5", Version: v1.9"""


def test_parameters_of_other_programs(bench):
    cells, model = parse_parameters(OTHERS)
    assert model == "dreams_v8"
    assert cells == {
        "kind": "image",
        "prompt": "a castle, (sharp:1.2)\non a hill",
        "negative_prompt": "blurry,\nugly",
        "steps": "28",
        "seed": "4093011",
        "guidance": "6.5",
        "width": "512",
        "height": "768",
    }
    file = text_png(bench.folder / "in" / "00001-4093011.png", parameters=OTHERS)
    with pytest.raises(BadRows, match="was made with the model 'dreams_v8'; say with --model"):
        jobs(file, named=False).check()
    (item,) = items(file, {"width": 64, "height": 64})
    assert (item.id, item.seed, item.params["width"]) == ("00001-4093011", 4093011, 64)
    assert (item.params["steps"], item.params["guidance"]) == (28, 6.5)
    summary = make(bench, jobs(file, {"width": 16, "height": 16, "steps": 2}), "new")
    assert summary.ok == 1 and bench.hashes("new").keys() == {"00001-4093011"}


def test_our_own_parameters_are_read_where_the_rest_was_lost(made):
    whole = next(made.rglob("full.png"))
    text_png(whole, parameters=inspect_file(whole)["text"]["parameters"])
    (item,) = items(whole)
    assert (item.id, item.seed, item.params["steps"]) == ("full", 7, 2)


@pytest.mark.parametrize(
    "text",
    ["", "a castle", "a castle\nSteps: 20", "x\nSteps: , Seed: 1", "x\nSteps: 4, Seed: -1"]
    + [
        "x\nSteps: 4, Seed: " + "9" * 100,
        "\nSteps: 4, Seed: 1",
        "x\nSteps: 4, Seed: 1, CFG scale: NaN",
    ]
    + ["x\nSteps: 4, Seed: 1, Size: 99999x99999", "x\nSteps: 4, Seed: one"],
)
def test_text_of_another_form_is_a_bad_row(bench, text):
    file = text_png(bench.folder / "x.png", parameters=text)
    with pytest.raises(BadRows, match=r"1 file cannot be run"):
        jobs(file).check()


@pytest.mark.parametrize(
    "unit", ["Steps: ", ', Seed: "', "Negative prompt: \n", "\n", "A: ", "\\", ", "]
)
def test_long_hostile_text_takes_no_time(unit):
    text = (
        "Steps: "
        + unit * (60_000 // len(unit))
        + "\nSteps: 1"
        + unit * (60_000 // len(unit))
        + ",x"
    )
    start = time.process_time()
    for given in (text, text.replace("\n", " ")):
        with contextlib.suppress(ConfigError):
            parse_parameters(given)
    assert time.process_time() - start < 0.5
