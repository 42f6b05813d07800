"""Items on models: errors stay with their item, memory that runs out, NaN, and what pixels depend on."""

from __future__ import annotations

import functools
import json
import random
from dataclasses import dataclass

import pytest
import torch
from PIL import Image

import mmattn
from mmattn.batch.guards import Guard, NonFiniteError, is_memory
from mmattn.batch.items import Item
from mmattn.batch.jobs import Jobs
from mmattn.batch.ledger import Record
from mmattn.batch.models import Models, Source
from mmattn.batch.worker import Options, Worker
from mmattn.batch.writers import read_metadata
from mmattn.errors import ConfigError, ModelLoadError
from mmattn.loading import Loaded
from mmattn.methods.base import Method
from mmattn.variants import parse


def run(bench, rows, *, batch=8, **more):
    items = bench.items(bench.write(rows))
    with Worker(bench.models(), Options(bench.folder / "out", batch), **more) as worker:
        return worker.run(items)


def prompts(count, *bad):
    return [{"id": str(i), "prompt": "poison" if i in bad else f"p{i}"} for i in range(count)]


def test_one_record_per_item_in_order_whatever_fails(bench):
    rows = [*prompts(8, 2, 7), {"id": "v", "prompt": "x", "num_frames": 3}]
    records = run(bench, rows)
    assert [r.id for r in records] == [*map(str, range(8)), "v"]
    assert [r.id for r in records if r.status == "failed"] == ["2", "7"]
    said = "FakePipe refuses the call: poisoned prompt"
    assert records[2].error == {"class": "ConfigError", "message": said}
    assert records[2].file is None
    assert records[8].file.endswith("v.mp4")
    # Halving: eight, then fours, and so on down to the two that cannot be made.
    assert bench.pipe.calls[0] == 8 and sum(c == 1 for c in bench.pipe.calls) <= 7
    assert all(isinstance(r, Record) and r.attempt == 1 for r in records)


@pytest.mark.parametrize("error", [MemoryError(), ValueError("an odd size")])
def test_an_encoder_that_fails_fails_its_item_only(bench, monkeypatch, error):
    encode, seen = Image.Image.save, []

    def save(image, *args, **more):
        seen.append(image)
        if len(seen) == 2:
            raise error
        return encode(image, *args, **more)

    monkeypatch.setattr(Image.Image, "save", save)
    records = run(bench, prompts(3))
    assert [r.status for r in records] == ["ok", "failed", "ok"]
    assert records[1].error["class"] == type(error).__name__ and records[1].file is None
    written = [path.name for path in (bench.folder / "out").rglob("*") if path.is_file()]
    assert sorted(written) == ["0.png", "2.png"]


@pytest.mark.parametrize("fits", [1, 2, 3])
def test_a_batch_that_does_not_fit_is_halved_and_the_size_remembered(bench, fits):
    bench.pipe.fits = fits
    records = run(bench, prompts(32))
    assert [r.status for r in records] == ["ok"] * 32
    good = [c for c in bench.pipe.calls if c <= fits]
    assert sum(good) == 32, "every item is made once"
    failed = [c for c in bench.pipe.calls if c > fits]
    assert len(failed) <= 3, "the size that fits is found once, not in every batch"
    assert "out of memory with 8 items in a call" in records[0].notes
    assert len({r.pixels for r in records}) == 32


def test_memory_that_never_suffices_fails_every_item(bench):
    bench.pipe.fits = 0
    records = run(bench, prompts(4), batch=2)
    assert [r.status for r in records] == ["failed"] * 4
    assert {r.error["class"] for r in records} == {"OutOfMemoryError"}
    assert not list((bench.folder / "out").rglob("*.png"))


def test_decoding_in_tiles_is_the_last_resort_and_does_not_stay_on(bench):
    bench.pipe.fits, bench.pipe.tiled_fits = 0, True
    records = run(bench, prompts(2), batch=2)
    assert [r.status for r in records] == ["ok", "ok"]
    assert all("out of memory; decoded in tiles" in r.notes for r in records)
    assert bench.pipe.vae.tilings == 2 and not bench.pipe.vae.use_tiling
    meta = read_metadata(bench.folder / "out" / records[0].file)
    assert meta["notes"] == ["out of memory; decoded in tiles"]


def offloadable(bench, fits=None):
    """A pipeline that fits once its models are moved in and out."""

    class Offloadable(type(bench.pipe)):
        def enable_model_cpu_offload(self, device):
            self.enabled.append(device)
            self.fits = None

    pipe = Offloadable(fits=fits)
    pipe.enabled = []
    return pipe


def on_an_accelerator(load):
    return Models(
        {"image": Source("fake", "t2i", "xpu"), "caption": Source("words", "vlm", "xpu")}, load
    )


def test_models_are_offloaded_after_halving_and_tiles(bench):
    pipe = offloadable(bench, fits=0)
    models = on_an_accelerator(lambda source: Loaded("t2i", pipe))
    with Worker(models, Options(bench.folder / "out", 2)) as worker:
        records = worker.run(bench.items(bench.write(prompts(4))))
    assert [r.status for r in records] == ["ok"] * 4
    halved = "out of memory with 2 items in a call"
    assert records[0].notes == [
        halved,
        "out of memory; decoded in tiles",
        "out of memory; models wait in main memory",
    ]
    assert records[1].notes == [halved, "models wait in main memory"]
    assert records[2].notes == records[3].notes == ["models wait in main memory"]
    assert pipe.enabled == [torch.device("xpu")], "once, and then for the rest of the run"
    assert pipe.calls == [2, 1, 1, 1, 1, 1, 1] and not pipe.vae.use_tiling
    bench.run(bench.folder / "jobs.jsonl", "plain")
    plain = [r["pixels"] for r in bench.records("plain")]
    assert [r.pixels for r in records] == plain and len(set(plain)) == 4


def test_offload_that_cannot_help_is_said(bench):
    tiles = "out of memory; decoded in tiles"
    bench.pipe.fits = 0
    (record,) = run(bench, prompts(1))
    assert record.notes == [
        tiles,
        "out of memory; not offloaded: the model runs in main memory already",
    ]

    def refuse(device):
        raise ValueError("a device map is in use")

    bench.pipe.enable_model_cpu_offload = refuse
    models = on_an_accelerator(lambda source: Loaded(source.kind, bench.pipe))
    with Worker(models, Options(bench.folder / "out")) as worker:
        first, second = worker.run(bench.items(bench.write(prompts(2))))
    assert first.status == second.status == "failed"
    for record in (first, second):
        assert record.error["class"] == "OutOfMemoryError"
        assert record.notes == [
            tiles,
            "out of memory; not offloaded: ValueError: a device map is in use",
        ]


def test_models_of_transformers_are_not_offloaded(bench):
    class Processor:
        def apply_chat_template(self, *more, **named):
            raise torch.OutOfMemoryError("CUDA out of memory")

    Image.new("RGB", (8, 8)).save(bench.folder / "p.png")
    jobs = Jobs(bench.write([{"id": "c", "image": "p.png"}]))
    jobs.check()
    models = on_an_accelerator(lambda source: Loaded("vlm", object(), Processor()))
    with Worker(models, Options(bench.folder / "out")) as worker:
        (record,) = worker.run(list(jobs.items({"caption": "m"})))
    assert record.status == "failed" and record.error["class"] == "OutOfMemoryError"
    assert record.notes == ["out of memory; not offloaded: only pipelines of diffusers can be"]


def test_a_pipeline_too_large_to_be_loaded_is_loaded_into_main_memory(bench):
    asked, pipe = [], offloadable(bench)

    def load(source):
        asked.append(source.device)
        if source.device != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Loaded("t2i", pipe)

    items = bench.items(bench.write(prompts(3)))
    with Worker(on_an_accelerator(load), Options(bench.folder / "out", 2)) as worker:
        records = worker.run(items)
    assert [r.status for r in records] == ["ok"] * 3
    assert {tuple(r.notes) for r in records} == {("models wait in main memory",)}
    assert asked == ["xpu", "cpu"] and pipe.calls == [2, 1], "batches stay as they are"


def test_what_counts_as_memory():
    assert is_memory(MemoryError()) and is_memory(torch.OutOfMemoryError("x"))
    assert is_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))
    assert not is_memory(RuntimeError("shapes do not fit")) and not is_memory(ValueError("memory"))


def test_nan_fails_its_item_and_leaves_its_neighbours(bench):
    rows = [{"id": str(i), "prompt": "nan" if i == 1 else f"p{i}", "steps": 4} for i in range(3)]
    alone = run(bench, [rows[0], rows[2]], batch=1)
    records = run(bench, rows)
    assert [r.status for r in records] == ["ok", "failed", "ok"]
    assert "after step 1" in records[1].error["message"]
    assert [r.counters["step_checks"] for r in records if r.status == "ok"] == [4, 4]
    assert [records[0].pixels, records[2].pixels] == [r.pixels for r in alone]
    bench.pipe.calls.clear()
    records = run(bench, [rows[1]])
    assert records[0].status == "failed" and bench.pipe.calls == [1]


def test_the_guard_looks_once_a_step_and_after_decoding():
    guard = Guard(2)
    good = torch.zeros(2, 4, 3)
    assert guard(None, 0, 0, {"latents": good})["latents"] is good
    bad = good.clone()
    bad[1, 2, 1] = float("inf")
    guard(None, 1, 0, {"latents": bad})
    assert guard.bad == {1: 1} and guard.checks == 2
    with pytest.raises(NonFiniteError, match="after step 2"):
        first = bad.clone()
        first[0] = float("nan")
        Guard(2)(None, 2, 0, {"latents": first})
    guard = Guard(1)
    guard.look(torch.full((1, 3, 2, 2), float("nan")))
    assert guard.reason(0) == "the decoded picture holds NaN or infinity"


def test_a_worker_that_is_told_to_stop_skips_the_rest(bench):
    seen = []

    def stopping():
        return len(seen) >= 2 or seen.append(1)

    records = run(bench, prompts(5), batch=1, stopping=stopping)
    assert [r.status for r in records] == ["ok", "ok", "skipped", "skipped", "skipped"]


def test_without_metadata_files_say_nothing(bench):
    items = bench.items(bench.write(prompts(1)))
    for metadata in (True, False):
        options = Options(bench.folder / str(metadata), metadata=metadata)
        with Worker(bench.models(), options) as worker:
            (record,) = worker.run(items)
        with Image.open(options.out / record.file) as image:
            assert set(image.text) == ({"parameters", "mmattn"} if metadata else set())


def test_models_are_named_once_per_kind():
    models = Models.named(None)
    assert list(models.sources) == ["image", "imageset", "video", "caption"]
    assert Models.named(["t2v"]).default_kind == "video"
    with pytest.raises(ConfigError, match="both make images"):
        Models.named(["t2i", "t2i"])
    with pytest.raises(ConfigError, match="of kind vit"):
        Models.named(["vit"])
    with pytest.raises(ConfigError, match="--kind"):
        Models.named(["someone/model"])


def test_fingerprints_change_with_any_byte(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["XForConditionalGeneration"]}')
    (folder / "model.safetensors").write_bytes(b"weights")
    source = Models.named([str(folder)]).sources["caption"]
    first = source.fingerprint()
    assert Source(source.name, "vlm", "cpu", "bfloat16").fingerprint() != first
    assert Source(source.name, "vlm", "cuda:1").fingerprint() != first
    (folder / "model.safetensors").write_bytes(b"weightz")
    assert source.fingerprint() != first


# -- the embedded models --------------------------------------------------------------------------------


@functools.cache
def embedded():
    return Models.named(None)


def real(folder, rows, *, batch=1):
    path = folder / "jobs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    jobs = Jobs(path, {"steps": 2})
    found = jobs.check()
    items = list(jobs.items(embedded().fingerprints(list(found.items))))
    with Worker(embedded(), Options(folder / "out", batch)) as worker:
        return worker.run(items)


SCENES = [
    {"id": f"s{i}", "prompt": f"a {color} circle on a white background"}
    for i, color in enumerate(["red", "blue", "green", "yellow", "purple"])
]


@pytest.mark.parametrize("method", [None, "agent-attention:agents=16"])
def test_one_by_one_files_depend_on_nothing_but_their_item(tmp_path, method):
    rows = [{**row, **({} if method is None else {"method": method})} for row in SCENES]
    first = {r.id: r.sha256 for r in real(tmp_path, rows)}
    random.Random(3).shuffle(rows)
    again = real(tmp_path, rows)
    assert {r.id: r.sha256 for r in again} == first and len(set(first.values())) == 5
    if method is not None:
        assert {r.counters["calls"] for r in again} == {24}
        assert all(r.counters["density"] < 1 and not r.counters["dense_calls"] for r in again)


def test_in_one_call_pixels_move_by_rounding_only(tmp_path):
    import numpy as np

    def pixels(folder, batch):
        folder.mkdir()
        records = real(folder, SCENES, batch=batch)
        return np.stack([np.asarray(Image.open(folder / "out" / r.file)) for r in records])

    one, five = (pixels(tmp_path / str(b), b).astype(int) for b in (1, 5))
    assert abs(one - five).max() <= 1


AGENTS = "agent-attention:agents=16"


def test_an_item_with_a_method_that_needed_offload_is_the_same_picture(tmp_path):
    from mmattn import mini

    pipe, tries = mini.load("t2i"), []
    pipe.set_progress_bar_config(disable=True)

    def never_fits(module, arguments):
        tries.append(hasattr(module, "_hf_hook"))
        if not tries[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory")

    pipe.transformer.register_forward_pre_hook(never_fits)
    # There is no accelerator here; the hooks are the same.
    enable = type(pipe).enable_model_cpu_offload
    pipe.enable_model_cpu_offload = lambda device: enable(pipe, device="cpu")
    row = {**SCENES[0], "method": AGENTS}
    (plain,) = real(tmp_path, [row])
    items = list(Jobs(tmp_path / "jobs.jsonl", {"steps": 2}).items({"image": "m"}))
    models = Models(
        {"image": Source("t2i", "t2i", "xpu")}, lambda s: Loaded("t2i", pipe, embedded=True)
    )
    with Worker(models, Options(tmp_path / "offloaded")) as worker:
        first, second = worker.run(items)[0], worker.run(items)[0]
    assert tries == [False, False] + [True] * 8, "plain, in tiles, and two pictures"
    assert first.notes[-1] == "out of memory; models wait in main memory"
    assert second.pixels == plain.pixels and second.notes == ["models wait in main memory"]
    for record in (first, second):
        assert record.counters == plain.counters and record.counters["calls"] == 24


@pytest.mark.parametrize("how", ["whole", "leaves"])
@pytest.mark.parametrize("first", ["hooks", "method"])
def test_methods_run_under_the_hooks_that_offload(how, first):
    from accelerate import cpu_offload

    from mmattn import mini
    from mmattn.calls import draw

    pipe = mini.load("t2i")
    pipe.set_progress_bar_config(disable=True)
    loaded = Loaded("t2i", pipe, embedded=True)

    def hook():
        if how == "whole":
            pipe.enable_model_cpu_offload(device="cpu")
        else:  # as enable_sequential_cpu_offload does it to each model
            cpu_offload(pipe.transformer, torch.device("cpu"))

    def picture():
        return draw(loaded, ["a red circle"], [3], steps=2)

    (method,) = parse(AGENTS).methods
    dense = picture()
    with mmattn.attach(pipe, method) as session:
        wanted = picture()
    calls = session.stats.calls
    assert calls > 0 and not torch.equal(wanted, dense)
    if first == "hooks":
        hook()
    with mmattn.attach(pipe, method) as session:
        if first == "method":
            hook()
        assert torch.equal(picture(), wanted)
        assert session.stats.calls == calls and session.stats.density < 1
    assert torch.equal(picture(), dense), "and nothing of it stays"


@pytest.fixture
def breaking(monkeypatch):
    """A method that gives NaN in its second step for prompts that it cannot see, but counts."""
    from mmattn import registry

    calls = []

    @dataclass(frozen=True)
    class Breaking(Method):
        """Gives NaN when `when` holds."""

        name = "breaking"
        seams = ("attention",)
        hosts = ("diffusers",)
        always: bool = True

        def attend(self, q, k, v, *, mask, scale, site, dense):
            calls.append(site.path)
            out = dense(q, k, v)
            return out * float("nan") if self.always else out

    monkeypatch.setitem(registry._registered, "breaking", Breaking)
    return calls


def test_a_method_that_breaks_is_left_out_and_that_is_recorded(tmp_path, breaking):
    rows = [{**SCENES[0], "method": "breaking"}, {**SCENES[1], "method": "breaking:always=false"}]
    broken, fine = real(tmp_path, rows)
    dense, _ = real(tmp_path, SCENES[:2])
    assert breaking, "the method ran"
    assert broken.status == fine.status == "ok"
    assert broken.pixels == dense.pixels
    assert broken.notes == ["the latents hold NaN or infinity after step 0; made without methods"]
    assert fine.notes == [] and fine.counters["calls"] > 0


def test_a_method_without_a_site_fails_its_items_only(tmp_path):
    records = real(
        tmp_path, [SCENES[0], {**SCENES[1], "method": "hiprune:keep=4"}, SCENES[2]], batch=2
    )
    assert [r.status for r in records] == ["ok", "failed", "ok"]
    assert records[1].error["class"] == "NoSiteError"
    site = embedded().get("image").target.transformer
    with mmattn.attach(site, "identity"):
        pass  # nothing was left attached


def test_every_kind_is_made(tmp_path):
    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "p.png")
    rows = [
        {"id": "i", "prompt": "a red circle", "init_image": "p.png", "strength": 0.6},
        {
            "id": "v",
            "prompt": "a red circle moving right",
            "num_frames": 5,
            "width": 32,
            "height": 32,
        },
        {"id": "c", "image": "p.png", "max_new_tokens": 4},
        {"id": "s", "panels": [{"prompt": "a red box", "image": "p.png"}, "a blue square"]},
        {"id": "w", "kind": "video", "prompt": "a circle", "init_image": "p.png"},
    ]
    records = real(tmp_path, rows)
    assert [r.status for r in records] == ["ok", "ok", "ok", "ok", "failed"]
    assert "image-to-video" in records[4].error["message"]
    out = tmp_path / "out"
    assert [r.file.split("/")[0] for r in records[:4]] == ["images", "videos", "captions", "sets"]
    assert read_metadata(out / records[1].file)["num_frames"] == 5
    caption = json.loads((out / records[2].file).read_text())
    assert caption["answer"] == records[2].answer != ""
    with Image.open(out / records[3].file) as canvas:
        panels = [
            Image.open((out / records[3].file).with_suffix(".panels") / f"{n}.png") for n in (1, 2)
        ]
        assert canvas.width * canvas.height == 2 * 64 * 64
        # The given panel is the given picture.
        assert panels[0].getpixel((30, 30)) == (200, 30, 30)


def test_an_item_is_plain_data():
    import pickle

    item = Item("a", "image", 1, {"prompt": "x"}, ({"name": "identity"},), "identity", "m", 3)
    assert pickle.loads(pickle.dumps(item)) == item
    models = pickle.loads(pickle.dumps(Models.named(None)))
    assert models.sources["caption"] == Source("vlm", "vlm")


def test_a_model_that_cannot_be_loaded_stops_the_run(bench):
    def load(source):
        raise ModelLoadError("no such folder")

    items = bench.items(bench.write(prompts(3)))
    models = Models(bench.models().sources, load)
    with Worker(models, Options(bench.folder / "out")) as worker, pytest.raises(ModelLoadError):
        worker.run(items)
