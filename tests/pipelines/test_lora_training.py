"""In-Context LoRA training: the loss, the average, what is given, resume after a kill, and the files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import diffusers
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

import mmattn.mini
from mmattn.errors import ConfigError

pytest.importorskip("peft", reason="the trainer needs mmattn[train]")

from mmattn_pipelines.in_context import lora_target_modules
from mmattn_pipelines.lora_files import comfyui_keys
from mmattn_pipelines.lora_training import ADAPTER, COMFYUI, LORA, STATE, InContextLora, _Run, train

TINY = {
    "rank": 2,
    "steps": 4,
    "batch": 2,
    "learning_rate": 1e-2,
    "resolutions": (91,),
    "max_sequence_length": 24,
    "gradient_checkpointing": False,
    "save_every": 2,
    "panels": (1, 2),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("canvases")
    for i, colour in enumerate(("red", "green", "blue", "yellow", "purple")):
        canvas = Image.new("RGB", (128, 64), "black")
        pen = ImageDraw.Draw(canvas)
        pen.ellipse((10 + i, 20, 40, 50), colour)
        pen.rectangle((80, 10, 110 + i, 40), colour)
        canvas.save(folder / f"{i:04d}.png")
        (folder / f"{i:04d}.txt").write_text(f"[SET] a {colour} circle, [LEFT] top; [RIGHT] bottom")
    return folder


@pytest.fixture
def pipe():
    return mmattn.mini.load("t2i")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """One whole training, its pipeline, and the parameters after every step."""
    pipe, seen = mmattn.mini.load("t2i"), []
    before = {n: p.clone() for n, p in pipe.transformer.named_parameters()}

    def watch(step, loss):
        seen.append(
            {n: p.detach().clone() for n, p in pipe.transformer.named_parameters() if "lora" in n}
        )

    out = tmp_path_factory.mktemp("run")
    result = train(pipe, data, out, InContextLora(**TINY), on_step=watch)
    return pipe, out, result, before, seen


def test_only_the_lora_was_trained(trained):
    pipe, _, result, before, seen = trained
    after = {n.replace(".base_layer", ""): p for n, p in pipe.transformer.named_parameters()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    layers = lora_target_modules(mmattn.mini.load("t2i").transformer)
    assert result.layers == len(layers) == len(seen[0]) / 2
    assert result.parameters == sum(p.numel() for p in seen[0].values())
    assert all(not torch.equal(seen[0][n], seen[-1][n]) for n in seen[0] if "lora_B" in n)
    assert not any(p.requires_grad for p in pipe.transformer.parameters())
    assert (result.steps, result.resumed, result.canvases, result.buckets) == (4, 0, 5, 5)


def test_the_average_is_what_is_saved(trained):
    _, out, _, _, seen = trained
    torch.manual_seed(0)
    first = InContextLora(**TINY)
    name = next(n for n in seen[0] if "lora_B" in n)
    average = torch.zeros_like(seen[0][name])  # every up-projection begins at zero
    for step, now in enumerate(seen, 1):
        decay = min(first.ema, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * now[name]
    saved = load_file(out / LORA)["transformer." + name.replace(f".{ADAPTER}", "")]
    assert torch.allclose(saved.float(), average, atol=1e-3 * average.abs().max().item())
    assert not torch.allclose(saved.float(), seen[-1][name], atol=1e-3)


def test_stock_diffusers_loads_the_file(trained):
    pipe, out, _, _, _ = trained
    fresh = mmattn.mini.load("t2i")
    draw = {
        "prompt": "a red circle",
        "height": 64,
        "width": 128,
        "num_inference_steps": 2,
        "max_sequence_length": 24,
        "output_type": "latent",
    }

    def latents(p):
        p.set_progress_bar_config(disable=True)
        return p(**draw, generator=torch.Generator().manual_seed(0)).images

    plain = latents(fresh)
    fresh.load_lora_weights(out, weight_name=LORA)
    loaded, ours = latents(fresh), latents(pipe)
    assert (loaded - plain).abs().max() > 1e-2
    assert (loaded - ours).abs().max() < 2e-2 * (ours - plain).abs().max()  # half precision on disk
    fresh.unload_lora_weights()
    assert torch.equal(latents(fresh), plain)


def test_checkpoints_and_record(trained):
    _, out, result, _, _ = trained
    names = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert names == ["step-000002.safetensors", "step-000004.safetensors"]
    record = json.loads((out / "training.json").read_text())
    assert record["recipe"]["rank"] == 2 and record["layers"] == result.layers
    assert load_file(out / LORA).keys() == load_file(out / "checkpoints" / names[-1]).keys()


def test_the_loss_is_flow_matching_with_the_stock_model(data, pipe, tmp_path):
    """At the first step the LoRA is zero, so the untouched model has the same loss."""
    from mmattn_pipelines.lora_data import Latents, bucket_sizes, read_folder

    config = InContextLora(**{**TINY, "caption_dropout": 0.0})
    examples = read_folder(data)
    pairs = [(e, s) for e in examples for s in bucket_sizes(e.size, (91,), (8, 16))]
    cache = Latents(pipe.vae, tmp_path / "z", (1, 2))
    rows = [3, 1]
    z = [cache(*pairs[row]) for row in rows]
    clean = torch.stack([pipe._pack_latents(x[None], 1, *x.shape)[0] for x in z])
    g = torch.Generator().manual_seed(1)  # seed 0, step 1
    noise = torch.randn(clean.shape, generator=g)
    t = torch.sigmoid(torch.randn(2, generator=g))
    with torch.no_grad():
        text, pooled, ids = pipe.encode_prompt(
            [examples[row].caption for row in rows], None, max_sequence_length=24
        )
        velocity = pipe.transformer(
            hidden_states=(1 - t)[:, None, None] * clean + t[:, None, None] * noise,
            timestep=t,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            txt_ids=ids,
            img_ids=pipe._prepare_latent_image_ids(2, 8, 16, "cpu", torch.float32),
            return_dict=False,
        )[0]
    expected = (velocity - (noise - clean)).square().mean().item()
    run = _Run(pipe, config, pairs, tmp_path)
    run.encode(lambda _: None)
    assert run.step(1, rows) == pytest.approx(expected, rel=1e-4)
    assert run.step(1, rows) < expected  # the same draw, after one step of the optimiser


def test_given_panels_are_clean_and_no_part_of_the_loss(data, pipe, tmp_path, monkeypatch):
    config = InContextLora(**{**TINY, "references": 1, "caption_dropout": 0.0})
    from mmattn_pipelines.lora_data import bucket_sizes, read_folder

    pairs = [(e, s) for e in read_folder(data) for s in bucket_sizes(e.size, (91,), (8, 16))]
    run = _Run(pipe, config, pairs, tmp_path)
    run.encode(lambda _: None)
    left = torch.zeros(8, 16, dtype=torch.bool)
    left[:, :8] = True
    left = left.flatten()
    seen = []

    def predict(self, noisy, t, captions, size):
        clean = torch.stack([self._latents[0], self._latents[1]])
        seen.append(torch.equal(noisy[:, left], clean[:, left]))
        wrong = torch.where(left[None, :, None], 1e6, 0.0).expand_as(noisy)
        return wrong + 0 * sum(p.sum() for p in self.parameters)

    monkeypatch.setattr(_Run, "_predict", predict)
    losses = [run.step(step, [0, 1]) for step in range(1, 13)]
    given = [loss < 1e3 for loss in losses]
    assert given == seen and 2 < sum(given) < 10  # a coin decides for every batch


def test_models_with_a_guidance_input_are_fed_one(pipe, data, tmp_path):
    config = dict(pipe.transformer.config)
    with_guidance = diffusers.FluxTransformer2DModel.from_config(
        {**config, "guidance_embeds": True}
    )
    pipe.register_modules(transformer=with_guidance)
    fed = []
    with_guidance.register_forward_pre_hook(
        lambda _, __, kwargs: fed.append(kwargs["guidance"]), with_kwargs=True
    )
    train(pipe, data, tmp_path, InContextLora(**{**TINY, "steps": 1}))
    assert fed and all((g == 1.0).all() and g.shape == (2,) for g in fed)


def test_a_killed_training_ends_with_the_same_weights(trained, data, tmp_path):
    """kill -9 between checkpoints; what was lost is done again, bit by bit."""
    _, whole, _, _, _ = trained
    command = [sys.executable, "-m", "mmattn.cli", "train", "in-context-lora", "--data", str(data)]
    command += ["--out", str(tmp_path / "lora"), "--panels", "1x2", "--rank", "2", "--batch", "2"]
    command += ["--steps", "4", "--learning-rate", "1e-2", "--save-every", "2"]
    command += ["--max-sequence-length", "24", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    state = tmp_path / "lora" / STATE
    deadline = time.monotonic() + 120
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state.exists() and not (tmp_path / "lora" / LORA).exists()
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["resumed"] == 2
    for name in (LORA, COMFYUI):
        ours, theirs = load_file(tmp_path / "lora" / name), load_file(whole / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_refusals_come_before_work(pipe, data, tmp_path, trained):
    _, out, _, _, _ = trained
    with pytest.raises(ConfigError, match="another recipe or other data"):
        train(pipe, data, out, InContextLora(**{**TINY, "rank": 3}))
    pipe.unload_lora_weights()
    with pytest.raises(ConfigError, match="FLUX pipelines"):
        train(mmattn.mini.load("t2v"), data, tmp_path, InContextLora(**TINY))
    with pytest.raises(ConfigError, match="needs panels"):
        InContextLora(references=1)
    with pytest.raises(ConfigError, match="at most 1"):
        InContextLora(references=2, panels=(1, 2))
    for name, value in (("rank", 0), ("ema", 1.0), ("learning_rate", 0.0), ("resolutions", ())):
        with pytest.raises(ConfigError, match=name):
            InContextLora(**{name: value})
    (tmp_path / STATE).write_bytes(b"torn")
    with pytest.raises(ConfigError, match="delete it"):
        train(mmattn.mini.load("t2i"), data, tmp_path, InContextLora(**TINY))


def published_sizes():
    """One block of each kind of FLUX.1, rank 2, as diffusers names its layers."""
    g = torch.Generator().manual_seed(0)
    d, sizes = 3072, {}
    double = "transformer.transformer_blocks.0."
    for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"):
        sizes[f"{double}attn.{name}"] = (d, d)
    sizes[f"{double}attn.to_add_out"] = (d, d)
    for part in ("ff", "ff_context"):
        sizes[f"{double}{part}.net.0.proj"], sizes[f"{double}{part}.net.2"] = (4 * d, d), (d, 4 * d)
    sizes[f"{double}norm1.linear"] = sizes[f"{double}norm1_context.linear"] = (6 * d, d)
    single = "transformer.single_transformer_blocks.37."
    for name in ("to_q", "to_k", "to_v"):
        sizes[f"{single}attn.{name}"] = (d, d)
    sizes[f"{single}proj_mlp"], sizes[f"{single}proj_out"] = (4 * d, d), (d, 5 * d)
    sizes[f"{single}norm.linear"] = (3 * d, d)
    lora = {}
    for name, (out, into) in sizes.items():
        lora[f"{name}.lora_A.weight"] = torch.randn(2, into, generator=g)
        lora[f"{name}.lora_B.weight"] = torch.randn(out, 2, generator=g)
    return lora


def test_comfyui_file_is_read_by_stock_diffusers_without_loss():
    lora = published_sizes()
    theirs = comfyui_keys(lora)
    assert "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight" in theirs
    assert theirs["lora_unet_single_blocks_37_linear1.lora_down.weight"].shape == (8, 3072)
    assert theirs["lora_unet_single_blocks_37_linear1.alpha"] == 8
    back = diffusers.FluxPipeline.lora_state_dict({k: v.clone() for k, v in theirs.items()})
    back = back[0] if isinstance(back, tuple) else back
    assert back.keys() == lora.keys()
    assert all(torch.equal(back[key], lora[key]) for key in lora)


def test_comfyui_refuses_half_a_fused_layer():
    lora = {k: v for k, v in published_sizes().items() if ".attn.to_k." not in k}
    with pytest.raises(ConfigError, match="img_attn_qkv"):
        comfyui_keys(lora)
    with pytest.raises(ConfigError, match="no place for"):
        comfyui_keys({"transformer.x_embedder.lora_A.weight": torch.zeros(1, 1)})


def test_cli_refuses_bad_panels():
    from mmattn.cli import main

    assert main(["train", "in-context-lora", "--data", "nowhere", "--panels", "2"]) == 2
    assert main(["train", "in-context-lora", "--data", "nowhere"]) == 2
