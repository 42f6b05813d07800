"""WanSparsePipeline on the embedded model: same numbers as attaching by hand, and no trace afterwards."""

from __future__ import annotations

import copy
import inspect
import json
import shutil
from pathlib import Path

import mmattn_pipelines.wan_sparse as module
import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline
from diffusers.utils import dynamic_modules_utils
from mmattn_pipelines.wan_sparse import WanSparsePipeline, WanSparsePipelineOutput, default_method

import mmattn
import mmattn.mini

PROMPT = "a red circle moving up"
SPARSE = mmattn.VMoBA(topk=2, dense_steps=0)
SIZE = {
    "height": 48,
    "width": 48,
    "num_frames": 9,
    "num_inference_steps": 2,
    "guidance_scale": 3.0,
    "negative_prompt": "",
    "max_sequence_length": 16,
    "output_type": "pt",
}


@pytest.fixture(scope="module")
def wan() -> WanPipeline:
    return mmattn.mini.load("t2v")


@pytest.fixture
def pipe(wan: WanPipeline) -> WanSparsePipeline:
    made = WanSparsePipeline.from_pipe(wan)
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipe, prompt=PROMPT, seed=0, **changes):
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **{**SIZE, **changes})


def trace(pipe):
    """Everything an attachment changes, to compare before and after."""
    modules = [(name, type(m), m.__dict__.keys()) for name, m in pipe.transformer.named_modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in pipe.transformer.modules()]
    processors = {name: (type(p), id(p)) for name, p in pipe.transformer.attn_processors.items()}
    return [(n, t, sorted(k)) for n, t, k in modules], hooks, processors, type(pipe.scheduler)


def test_a_call_equals_attaching_by_hand_and_leaves_no_trace(wan, pipe):
    dense, before = draw(wan).frames, trace(pipe)
    out = draw(pipe, sparse=SPARSE)
    assert isinstance(out, WanSparsePipelineOutput)
    assert trace(pipe) == before
    with mmattn.attach(wan, SPARSE) as session:
        by_hand = draw(wan).frames
    assert torch.equal(out.frames, by_hand)
    assert out.sparsity.density == session.stats.density
    assert out.sparsity.density < 0.5 and out.sparsity.executed == 6
    assert out.sparsity.calls == 6 * 2 * SIZE["num_inference_steps"]
    assert not torch.equal(out.frames, dense)
    assert torch.equal(draw(wan).frames, dense)


def test_none_is_the_stock_pipeline_bitwise(wan, pipe):
    out = draw(pipe, sparse=None)
    assert torch.equal(out.frames, draw(wan).frames)
    assert out.sparsity is None and len(out.to_tuple()) == 1


def test_tuples(pipe):
    frames, stats = draw(pipe, sparse=SPARSE, return_dict=False)
    assert frames.shape == (1, 9, 3, 48, 48) and stats.density < 0.5
    assert len(draw(pipe, sparse=None, return_dict=False)) == 1


@pytest.mark.parametrize("form", ["name", "mapping", "list", "recipe", "table"])
def test_every_form_of_the_argument(pipe, tmp_path: Path, form):
    settings = {"name": "vmoba", "topk": 2, "dense_steps": 0}
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[method]]\nname = "vmoba"\ntopk = 2\ndense_steps = 0\n')
    given = {
        "name": "vmoba",
        "mapping": settings,
        "list": [SPARSE],
        "recipe": recipe,
        "table": {"method": [settings], "sites": "*.blocks.0.attn1"},
    }[form]
    stats = draw(pipe, sparse=given).sparsity
    assert stats.planned == (1 if form == "table" else 6)
    assert stats.density < 1
    if form not in ("name", "table"):
        assert stats.density == draw(pipe, sparse=SPARSE).sparsity.density


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("vmobo", "unknown method 'vmobo', did you mean 'vmoba'"),
        ({"name": "vmoba", "topc": 2}, "unknown key 'topc'"),
        ("missing.toml", "no recipe file"),
        (3, "a method is a Method instance"),
    ],
)
def test_bad_methods_raise_before_anything_runs(pipe, bad, message):
    ran = []
    hook = pipe.text_encoder.register_forward_hook(lambda *_: ran.append(1))
    before = trace(pipe)
    with pytest.raises(mmattn.ConfigError, match=message):
        draw(pipe, sparse=bad)
    hook.remove()
    assert not ran and trace(pipe) == before


def test_unknown_arguments_are_errors_and_known_ones_are_listed(pipe):
    with pytest.raises(TypeError, match="num_frame"):
        draw(pipe, num_frame=9)
    known = inspect.signature(WanSparsePipeline.__call__).parameters
    assert set(known) == {*inspect.signature(WanPipeline.__call__).parameters, "sparse", "report"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_a_callback_leaves_the_model_clean(wan, pipe, error):
    dense, before = draw(wan).frames, trace(pipe)

    def fail(pipe, step, timestep, tensors):
        raise error

    with pytest.raises(error):
        draw(pipe, sparse=SPARSE, callback_on_step_end=fail)
    assert trace(pipe) == before
    assert torch.equal(draw(wan).frames, dense)


def test_callbacks_see_every_step_and_can_interrupt(pipe):
    seen = []

    def stop(pipe, step, timestep, tensors):
        seen.append((step, sorted(tensors)))
        pipe._interrupt = True
        return tensors

    before = trace(pipe)
    out = draw(pipe, sparse=SPARSE, callback_on_step_end=stop)
    assert seen == [(0, ["latents"])]
    assert out.sparsity.calls == 6 * 2
    assert trace(pipe) == before


def test_the_generator_decides_and_rows_do_not_mix(pipe):
    assert torch.equal(draw(pipe, seed=3).frames, draw(pipe, seed=3).frames)
    assert not torch.equal(draw(pipe, seed=3).frames, draw(pipe, seed=4).frames)
    generators = [torch.Generator().manual_seed(s) for s in (3, 4)]
    both = pipe(PROMPT, num_videos_per_prompt=2, generator=generators, **SIZE).frames
    assert both.shape[0] == 2
    torch.testing.assert_close(both[1:], draw(pipe, seed=4).frames, atol=1e-3, rtol=1e-3)


def test_report_goes_to_stderr_only_on_request(pipe, capsys):
    draw(pipe)
    assert capsys.readouterr() == ("", "")
    draw(pipe, report=True)
    out, err = capsys.readouterr()
    assert out == "" and "6 of 6 planned sites executed" in err


def test_the_default_follows_the_resolution(pipe):
    assert default_method((21, 30, 52)) == mmattn.VMoBA.wan_480p()
    assert default_method((21, 45, 80)) == mmattn.VMoBA.wan_720p()
    assert default_method((5, 6, 6)) == mmattn.VMoBA()
    # The embedded autoencoder shrinks by 4 and not by 8, so half the pixels make the grid of 480p.
    assert pipe.token_grid(240, 416, 81) == (21, 30, 52)
    assert torch.equal(draw(pipe).frames, draw(pipe, sparse=mmattn.VMoBA()).frames)


@pytest.mark.parametrize(
    ("height", "width", "frames"), [(48, 48, 9), (64, 48, 8), (16, 32, 1), (48, 64, 7)]
)
def test_the_grid_is_the_one_the_model_sees(pipe, height, width, frames):
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"].shape[2:]),
        with_kwargs=True,
    )
    size = {"height": height, "width": width, "num_frames": frames, "num_inference_steps": 1}
    latents = draw(pipe, sparse=None, output_type="latent", **size).frames
    hook.remove()
    t, y, x = seen[0]
    assert pipe.token_grid(height, width, frames) == (t, y // 2, x // 2)
    assert pipe.token_grid(8, 8, 1, latents) == (t, y // 2, x // 2)


def test_enable_and_disable(wan, pipe):
    dense, before = draw(wan).frames, trace(pipe)
    session = pipe.enable_sparse(SPARSE)
    first, second = draw(pipe), draw(pipe)
    assert torch.equal(first.frames, second.frames)
    assert first.sparsity.calls == second.sparsity.calls == session.stats.calls
    assert torch.equal(draw(pipe, sparse=None).frames, dense)
    with pytest.raises(mmattn.ConfigError, match="disable_sparse"):
        draw(pipe, sparse="vmoba")
    with pytest.raises(mmattn.ConflictError):
        pipe.enable_sparse(SPARSE)
    pipe.disable_sparse()
    pipe.disable_sparse()
    assert trace(pipe) == before
    assert torch.equal(first.frames, draw(pipe, sparse=SPARSE).frames)
    with pytest.raises(mmattn.ConfigError, match="needs a method"):
        pipe.enable_sparse(None)


def test_from_pipe_shares_components_and_keeps_their_precision(wan):
    mixed = WanPipeline(**wan.components, expand_timesteps=True)
    mixed.text_encoder = mixed.text_encoder.__class__(mixed.text_encoder.config).bfloat16()
    pipe = WanSparsePipeline.from_pipe(mixed)
    assert pipe.text_encoder is mixed.text_encoder and pipe.text_encoder.dtype == torch.bfloat16
    assert pipe.transformer is wan.transformer and pipe.transformer.dtype == torch.float32
    assert pipe.config.expand_timesteps is True
    other = type(wan.scheduler).from_config(wan.scheduler.config)
    assert WanSparsePipeline.from_pipe(wan, scheduler=other).scheduler is other
    assert (
        WanSparsePipeline.from_pipe(mixed, dtype=torch.float32).text_encoder.dtype == torch.float32
    )


def test_both_transformers_of_a_two_stage_model_run_sparse(wan):
    parts = {**wan.components, "transformer_2": copy.deepcopy(wan.transformer)}
    two = WanSparsePipeline.from_pipe(WanPipeline(**parts, boundary_ratio=0.7))
    two.set_progress_bar_config(disable=True)
    stats = draw(two, sparse=SPARSE, num_inference_steps=4).sparsity
    assert stats.planned == stats.executed == 12
    assert {site.calls for site in stats.sites} == {4}
    assert two.config.boundary_ratio == 0.7


def test_as_a_custom_pipeline_of_a_saved_folder(wan, pipe, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, code = tmp_path / "model", tmp_path / "code"
    code.mkdir()
    shutil.copy(module.__file__, code / "wan_sparse.py")
    wan.save_pretrained(folder)
    plain = WanPipeline.from_pretrained(folder)  # not `wan`: where weights lie changes last digits
    plain.set_progress_bar_config(disable=True)
    with mmattn.attach(plain, SPARSE) as session:
        frames = draw(plain).frames
    for file in (code / "wan_sparse.py", module.__file__):
        loaded = DiffusionPipeline.from_pretrained(
            folder, custom_pipeline=str(file), trust_remote_code=True
        )
        assert type(loaded).__name__ == "WanSparsePipeline" and type(loaded) is not type(pipe)
        loaded.set_progress_bar_config(disable=True)
        got = draw(loaded, sparse=SPARSE)
        assert torch.equal(got.frames, frames)
        assert got.sparsity.density == session.stats.density < 0.5
    loaded.save_pretrained(tmp_path / "again")
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "WanTransformer3DModel"]
    again = WanSparsePipeline.from_pretrained(tmp_path / "again")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again, sparse=SPARSE).frames, frames)
