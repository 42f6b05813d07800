"""The example scripts run: a batch survives bad lines and a kill, and fine-tuning changes weights."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import mmattn
import mmattn.mini

EXAMPLES = Path(__file__).parents[2] / "pipelines" / "examples"


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def batch():
    return script("long_video_batch")


@pytest.fixture(scope="module")
def finetune():
    return script("finetune_sparse_video")


HALF = '{"id": "a-blue-'
"""What a kill in the middle of a line leaves."""


def run(batch, prompts: Path, out: Path) -> int:
    short = ["--steps", "2", "--num-frames", "5", "--sparse", "vmoba:topk=2,dense_steps=0"]
    return batch.main(["--prompts", str(prompts), "--out", str(out), *short])


def manifest(out: Path) -> list[dict]:
    lines = (out / "manifest.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line != HALF]


def test_a_killed_batch_goes_on_where_it_stopped(batch, tmp_path: Path, monkeypatch, capsys):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "clips"
    prompts.write_text("a red circle moving up\n\na blue square moving left\n")

    film, calls = batch.film, []

    def killed_in_the_second(pipe, item, args):
        calls.append(item["prompt"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return film(pipe, item, args)

    monkeypatch.setattr(batch, "film", killed_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(batch, prompts, out)
    assert [row["ok"] for row in manifest(out)] == [True]
    with (out / "manifest.jsonl").open("a") as stream:
        stream.write(HALF)
    first = out / manifest(out)[0]["file"]
    written = first.stat().st_mtime_ns

    assert run(batch, prompts, out) == 0
    assert calls[2:] == ["a blue square moving left"]
    files = [row["file"] for row in manifest(out)]
    assert len(files) == 2 and all((out / file).stat().st_size > 500 for file in files)
    assert first.stat().st_mtime_ns == written
    captured = capsys.readouterr()
    assert "2 of 2 clips" in captured.err and captured.out == ""

    first.unlink()  # a line without its file is not finished
    assert run(batch, prompts, out) == 0
    assert calls[3:] == ["a red circle moving up"] and first.is_file()


def test_bad_lines_do_not_lose_the_others(batch, tmp_path: Path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "clips"
    lines = [
        '{"prompt": "a red circle moving up", "id": "../one"}',
        "not json",
        '{"prompt": ""}',
        '{"prompt": "a green ring moving down", "negative": 3}',
        '{"prompt": "a blue square moving left", "id": "../one"}',
        '{"prompt": "a blue square moving left", "seed": 7}',
    ]
    prompts.write_text("\n".join(lines))
    assert run(batch, prompts, out) == 3
    rows = manifest(out)
    assert [row["ok"] for row in rows] == [True, False, False, False, False, True]
    assert rows[0]["id"] == "one" and rows[5]["seed"] == 7
    assert all(row["error"] for row in rows if not row["ok"])
    assert all(0 < row["density"] < 0.5 and row["seconds"] > 0 for row in rows if row["ok"])
    assert {path.parent for path in tmp_path.rglob("*.mp4")} == {out}


def test_names_and_seeds_do_not_depend_on_the_order(batch, tmp_path: Path):
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text("one\ntwo\ntwo\n")
    b.write_text("two\nthree\none\ntwo\n")
    first, second = (list(batch.read_items(path, 0, "")) for path in (a, b))
    assert all(item in second for item in first)
    assert len({item["seed"] for item in second}) == len({i["id"] for i in second}) == 4
    other = list(batch.read_items(a, 1, ""))
    assert [i["id"] for i in other] == [i["id"] for i in first]
    assert all(x["seed"] != y["seed"] for x, y in zip(first, other, strict=True))


def test_a_bad_method_stops_before_the_first_item(batch, tmp_path: Path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n")
    with pytest.raises(mmattn.ConfigError, match="did you mean"):
        batch.main(["--prompts", str(prompts), "--out", str(tmp_path), "--sparse", "vmobo"])


def test_finetuning_runs_and_reports(finetune, tmp_path: Path, capsys):
    size = ["--steps", "2", "--batch", "2", "--clips", "16", "--held-out", "4"]
    assert finetune.main([*size, "--out", str(tmp_path)]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["training"]["steps"] == 2
    before, after = record["before"], record["after"]
    assert before["sparse"]["density"] < 0.3
    assert before["sparse"]["loss"] > before["dense"]["loss"]
    assert after["sparse"]["loss"] != before["sparse"]["loss"]
    saved = type(mmattn.mini.load("t2v")).from_pretrained(tmp_path)
    assert not torch.equal(
        saved.transformer.proj_out.weight.float(),
        mmattn.mini.load("t2v").transformer.proj_out.weight,
    )


def test_gradients_reach_everything_through_the_routed_attention(finetune):
    pipe = mmattn.mini.load("t2v")
    data = finetune.encode(pipe, 2, 5)
    shipped = mmattn.mini.load("t2v").vae.config
    assert pipe.vae.config.latents_mean == shipped.latents_mean
    assert pipe.vae.config.latents_std == shipped.latents_std
    method = mmattn.VMoBA(threshold=0.25, kind="head", dense_steps=0)
    with mmattn.attach(pipe, method) as session:
        finetune.flow_loss(pipe, data, torch.arange(2), 0).backward()
        assert session.stats.density < 0.3
    for name, parameter in pipe.transformer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_latents_are_those_the_pipeline_denoises(finetune):
    """What `encode` returns decodes, by the pipeline's own arithmetic, to the clips it drew."""
    from mmattn.mini.recipe import psnr
    from mmattn.mini.scenes import draw_clips, make_clips
    from mmattn.mini.train_t2v import FRAMES, SIZE

    pipe = mmattn.mini.load("t2v")
    z = finetune.encode(pipe, 2, 5)["latents"]
    pixels = draw_clips(make_clips(2, 5), SIZE, FRAMES) * 2 - 1
    frames = pipe(
        prompt_embeds=torch.zeros(2, 16, 96),
        latents=z,
        num_inference_steps=1,
        guidance_scale=1.0,
        callback_on_step_end=lambda pipe, i, t, tensors: {"latents": z},
        output_type="pt",
    ).frames
    assert psnr(frames.transpose(1, 2) * 2 - 1, pixels) > 25
