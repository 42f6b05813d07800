"""Whole pipelines: clock, CFG branches, callbacks, LoRA, fused projections, offloading, sharing."""

import copy
import dataclasses
import inspect
import json
from typing import ClassVar

import diffusers
import pytest
import torch
from diffusers_zoo import TEXT, rand
from host_contract import Raises, Zeroed, _Any as AnySite, check_contract, distance, snapshot

import mmattn

STEPS = 3


def _awake(module):
    """Random values where training would have put something; zeros would hide attention."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return module.eval()


@pytest.fixture(scope="module")
def parts():
    """Text encoders and tokenizers of the embedded models, untrained."""
    from mmattn.mini import train_t2i, train_t2v

    torch.manual_seed(0)
    return train_t2i.build_pipeline(seed=0).components, train_t2v.build_pipeline(seed=0).components


def _flux(parts):
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=32,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=96,
        pooled_projection_dim=64,
        axes_dims_rope=(4, 6, 6),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    made = {**parts[0], "transformer": _awake(transformer), "scheduler": scheduler}
    pipe = diffusers.FluxPipeline(**{k: v for k, v in made.items() if k != "image_encoder"})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _wan(parts):
    torch.manual_seed(0)
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=8,
        out_channels=8,
        text_dim=96,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0
    )
    made = {**parts[1], "transformer": _awake(transformer), "scheduler": scheduler}
    pipe = diffusers.WanPipeline(**made)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _sd(parts):
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=256,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=24,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    pipe = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
        text_encoder=text.eval(),
        tokenizer=parts[0]["tokenizer"],
        unet=_awake(unet),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


BUILD = {"flux": _flux, "wan": _wan, "sd": _sd}
ARGUMENTS = {
    "flux": {"height": 32, "width": 48, "max_sequence_length": 8},
    "wan": {"height": 32, "width": 48, "num_frames": 5, "max_sequence_length": 8},
    "sd": {"height": 8, "width": 16},
}


@pytest.fixture(scope="module")
def shared(parts):
    """One pipeline per family, for tests that leave it as they found it."""
    return {name: build(parts) for name, build in BUILD.items()}


def draw(pipe, **more):
    """Latents of one short run with a fixed seed."""
    name = {"FluxPipeline": "flux", "WanPipeline": "wan"}.get(type(pipe).__name__, "sd")
    fixed = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "latent"}
    arguments = {**ARGUMENTS[name], **fixed, **more}
    return pipe(
        prompt="a red circle",
        generator=torch.Generator().manual_seed(0),
        return_dict=False,
        **arguments,
    )[0]


@dataclasses.dataclass(frozen=True)
class Watch(AnySite):
    """Writes down step, branch, batch, grid and what `site.state` holds."""

    name: ClassVar[str] = "watch"
    needs: ClassVar[frozenset[str]] = frozenset({"clock"})
    seen: list = dataclasses.field(default_factory=list, compare=False, hash=False)

    def phase(self, step, total):
        return None if step is None else step * 1000 + total

    def attend(self, q, k, v, *, mask, scale, site, dense):
        if site.index == 0 and site.kind != "cross":
            kept = site.state.get("steps", 0)
            step, total = divmod(site.phase, 1000)
            self.seen.append((step, total, site.branch, q.shape[0], kept, site.layout.grid))
            site.state["steps"] = kept + 1
        return dense(q, k, v)


@pytest.mark.parametrize("name", BUILD)
def test_contract(shared, name):
    check_contract(shared[name], lambda pipe: draw(pipe, num_inference_steps=2), deep_copy=False)


@pytest.mark.parametrize("name", BUILD)
def test_decoded_output_is_bitwise_equal(shared, name):
    pipe = shared[name]
    stock = draw(pipe, output_type="np")
    with mmattn.attach(pipe, "identity") as session:
        assert (draw(pipe, output_type="np") == stock).all()
    assert session.stats.executed == session.stats.planned > 0
    assert all(
        row.path.startswith(("transformer.", "unet.")) and row.calls for row in session.stats.sites
    )


SCHEDULERS = {
    "flow-euler": ("flux", diffusers.FlowMatchEulerDiscreteScheduler, {}, 3),
    "unipc": ("wan", diffusers.UniPCMultistepScheduler, None, 3),
    "ddim": ("sd", diffusers.DDIMScheduler, {}, 3),
    "heun": ("sd", diffusers.HeunDiscreteScheduler, {}, 5),
    "dpm": ("sd", diffusers.DPMSolverMultistepScheduler, {}, 3),
    "pndm": ("sd", diffusers.PNDMScheduler, {"skip_prk_steps": True}, 4),
}


@pytest.mark.parametrize("case", SCHEDULERS)
def test_step_clock(parts, case):
    """Every model call sees its own step; second-order schedulers have more steps than asked for."""
    name, cls, settings, total = SCHEDULERS[case]
    pipe = BUILD[name](parts)
    if settings is not None:
        pipe.scheduler = cls(**settings)
    scheduler, plain = pipe.scheduler, copy.deepcopy(pipe.scheduler)
    watch = Watch()
    with mmattn.attach(pipe, watch) as session:
        assert type(scheduler).__name__ == cls.__name__ and isinstance(scheduler, cls)
        signature = inspect.signature(scheduler.set_timesteps)
        assert signature == inspect.signature(plain.set_timesteps)
        for _ in range(2):
            watch.seen.clear()
            draw(pipe, guidance_scale=1.0)
            assert [row[:2] for row in watch.seen] == [(i, total) for i in range(total)]
            assert [row[4] for row in watch.seen] == list(range(total)), "state outlived its run"
            assert session.clock.index == total and not session.clock.running
    assert type(scheduler) is cls and "_mmattn_clock" not in vars(scheduler)


def test_copied_and_saved_schedulers_are_stock(shared, tmp_path):
    pipe = shared["wan"]
    with mmattn.attach(pipe, "identity") as session:
        draw(pipe)
        index = session.clock.index
        twin = copy.deepcopy(pipe.scheduler)
        assert type(twin) is diffusers.UniPCMultistepScheduler
        twin.set_timesteps(7)
        twin.step(torch.zeros(1, 4), twin.timesteps[0], torch.zeros(1, 4))
        assert session.clock.index == index == STEPS
        pipe.scheduler.save_config(tmp_path)
        saved = json.loads((tmp_path / "scheduler_config.json").read_text())
        assert saved["_class_name"] == "UniPCMultistepScheduler"
        assert "_mmattn_clock" not in saved
        other = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        assert type(other) is diffusers.DPMSolverMultistepScheduler
        again = type(pipe.scheduler).from_config(pipe.scheduler.config)
        assert type(again) is diffusers.UniPCMultistepScheduler
        fresh = type(pipe.scheduler)()  # an instance of the observing class without a clock
        fresh.set_timesteps(2)
        fresh.step(torch.zeros(1, 4), fresh.timesteps[0], torch.zeros(1, 4))
        assert session.clock.index == STEPS


def test_cfg_in_one_batch(shared):
    watch = Watch()
    with mmattn.attach(shared["sd"], watch):
        draw(shared["sd"])
    assert [row[:4] for row in watch.seen] == [(i, STEPS, 0, 2) for i in range(STEPS)]


@pytest.mark.parametrize(("name", "guidance"), [("wan", {}), ("flux", {"true_cfg_scale": 2.0})])
def test_cfg_in_two_calls(shared, name, guidance):
    """Branches 0 and 1 alternate within a step, each with memory of its own; runs start empty."""
    watch = Watch()
    arguments = {"negative_prompt": "a blue square", **guidance}
    with mmattn.attach(shared[name], watch):
        for _ in range(2):
            watch.seen.clear()
            draw(shared[name], **arguments)
            steps = [(i, STEPS, branch) for i in range(STEPS) for branch in (0, 1)]
            assert [row[:3] for row in watch.seen] == steps
            assert [row[4] for row in watch.seen] == [i for i in range(STEPS) for _ in (0, 1)]


def test_resolution_may_change_between_runs(shared):
    watch = Watch()
    with mmattn.attach(shared["flux"], watch):
        draw(shared["flux"])
        draw(shared["flux"], height=64, width=32)
    assert {row[5] for row in watch.seen[:STEPS]} == {(1, 4, 6)}
    assert {row[5] for row in watch.seen[STEPS:]} == {(1, 8, 4)}
    watch = Watch()
    with mmattn.attach(shared["wan"], watch):
        draw(shared["wan"])
        draw(shared["wan"], num_frames=9, height=48)
    assert {row[5] for row in watch.seen[: 2 * STEPS]} == {(2, 4, 6)}
    assert {row[5] for row in watch.seen[2 * STEPS :]} == {(3, 6, 6)}


def test_image_to_image_starts_the_clock_late(shared):
    """The clock tells how far the noise schedule is, so a half-strength run begins in the middle."""
    pipe = diffusers.FluxImg2ImgPipeline(**shared["flux"].components)
    pipe.set_progress_bar_config(disable=True)
    watch = Watch()
    with mmattn.attach(pipe, watch):
        pipe(
            prompt="a red circle",
            image=rand(1, 3, 32, 48).clamp(-1, 1),
            strength=0.5,
            height=32,
            width=48,
            num_inference_steps=4,
            max_sequence_length=8,
            output_type="latent",
        )
    assert [row[:2] for row in watch.seen] == [(2, 4), (3, 4)]


def test_clock_methods_without_a_run_are_refused(shared):
    """A bare model has no scheduler; a scheduler put in later is not ours."""
    model = shared["flux"].transformer
    ids = torch.cartesian_prod(torch.arange(1), torch.arange(4), torch.arange(6)).float()
    kwargs = {
        "hidden_states": rand(1, 24, 32),
        "encoder_hidden_states": rand(1, TEXT, 96),
        "pooled_projections": rand(1, 64),
        "timestep": torch.tensor([0.5]),
        "img_ids": ids,
        "txt_ids": torch.zeros(TEXT, 3),
    }
    with mmattn.attach(model, Watch()) as session:
        with torch.no_grad(), pytest.raises(mmattn.UnsupportedCall, match=r"session\.step"):
            model(**kwargs)
        session.step(0, 2)
        with torch.no_grad():
            model(**kwargs)
    pipe = shared["flux"]
    old = pipe.scheduler
    with mmattn.attach(pipe, Watch()):
        draw(pipe)
        pipe.scheduler = type(old).from_config(old.config)
        with pytest.raises(mmattn.UnsupportedCall, match="replacing its scheduler"):
            draw(pipe)
        pipe.scheduler = old
    with mmattn.attach(pipe, Watch(), unsupported="dense") as session:
        pipe.scheduler = type(old).from_config(old.config)
        draw(pipe)
        pipe.scheduler = old
    assert session.stats.dense_calls == session.stats.calls > 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_error_in_a_callback_restores(shared, error):
    pipe = shared["flux"]
    stock = draw(pipe)
    before = snapshot(pipe)

    def stop(pipe, i, t, kwargs):
        if i == 1:
            raise error("from a callback")
        return kwargs

    with pytest.raises(error, match="from a callback"), mmattn.attach(pipe, Zeroed()):
        draw(pipe, callback_on_step_end=stop)
    assert snapshot(pipe) == before
    assert torch.equal(draw(pipe), stock)
    with pytest.raises(error, match="from a test"), mmattn.attach(pipe, Raises(error)):
        draw(pipe)
    assert snapshot(pipe) == before
    assert torch.equal(draw(pipe), stock)


def _adapter(pipe, folder):
    """A LoRA in a local folder, and the pipeline without it."""
    from peft import LoraConfig

    twin = copy.deepcopy(pipe.transformer)
    torch.manual_seed(1)
    twin.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    )
    from peft.utils import get_peft_model_state_dict

    type(pipe).save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(twin))
    return folder


def test_lora_before_and_after_attaching(parts, tmp_path):
    pipe = _flux(parts)
    stock = draw(pipe)
    folder = _adapter(pipe, tmp_path)
    with mmattn.attach(pipe, "identity") as session:
        pipe.load_lora_weights(folder)
        adapted = draw(pipe)
        assert distance(adapted, stock) > 1e-4
        assert session.stats.executed == session.stats.planned
    assert torch.equal(draw(pipe), adapted), "detaching lost the LoRA"
    with mmattn.attach(pipe, "identity"):
        assert torch.equal(draw(pipe), adapted)
        pipe.unload_lora_weights()
        assert torch.equal(draw(pipe), stock)
    assert torch.equal(draw(pipe), stock)


def test_fused_projections(parts):
    """Flux fuses inside the attention module and may do so at any time."""
    pipe = _flux(parts)
    stock = draw(pipe)
    with mmattn.attach(pipe, "identity") as session:
        pipe.transformer.fuse_qkv_projections()
        fused = draw(pipe)
        assert distance(fused, stock) < 1e-4 and session.stats.executed == session.stats.planned
    assert torch.equal(draw(pipe), fused)
    with mmattn.attach(pipe, "identity") as session:
        assert torch.equal(draw(pipe), fused)
    pipe.transformer.unfuse_qkv_projections()
    assert torch.equal(draw(pipe), stock)


def test_fusing_a_unet_replaces_processors(parts):
    """Fused before attaching it works; fused afterwards the next call says what to do."""
    pipe = _sd(parts)
    stock = draw(pipe)
    pipe.unet.fuse_qkv_projections()
    fused = draw(pipe)
    with mmattn.attach(pipe, "identity") as session:
        assert torch.equal(draw(pipe), fused)
        assert session.stats.executed == session.stats.planned > 0
    pipe.unet.unfuse_qkv_projections()
    session = mmattn.attach(pipe, Zeroed())
    pipe.unet.fuse_qkv_projections()
    with pytest.raises(mmattn.SeamNotReached, match="Detach, make the change, then attach again"):
        draw(pipe)
    with pytest.raises(mmattn.DetachConflict, match="was replaced"):
        session.detach()
    assert torch.equal(draw(pipe), fused), "the fused processors are the user's choice and stay"
    pipe.unet.unfuse_qkv_projections()
    assert torch.equal(draw(pipe), stock), "processors of a dead session must run the stock code"
    with mmattn.attach(pipe, "identity") as session:
        assert torch.equal(draw(pipe), stock)
        assert session.stats.executed == session.stats.planned > 0
    assert torch.equal(draw(pipe), stock)


def test_the_first_error_is_shown(parts):
    """Leaving the block must not hide the advice behind the conflict that follows from it."""
    pipe = _sd(parts)
    with (
        pytest.raises(mmattn.SeamNotReached, match="attach again") as caught,
        mmattn.attach(pipe, "identity"),
    ):
        pipe.unet.fuse_qkv_projections()
        draw(pipe)
    assert "was replaced" in caught.value.__notes__[0]


def test_first_block_cache(parts):
    """diffusers' own hooks wrap block forwards; ours sit below and stay out of their way."""
    from diffusers.hooks import FirstBlockCacheConfig

    pipe = _flux(parts)
    stock = draw(pipe)
    with mmattn.attach(pipe, "identity") as session:
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
        cached = draw(pipe)
        calls = [row.calls for row in session.stats.sites]
        assert calls == [STEPS, 1], "the cached block still ran"
    assert torch.equal(draw(pipe), cached) and distance(cached, stock) > 1e-6
    pipe.transformer.disable_cache()
    assert torch.equal(draw(pipe), stock)


@pytest.mark.parametrize("order", ["before", "after"])
def test_accelerate_offloading(parts, order):
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_module

    pipe = _flux(parts)
    stock = draw(pipe)
    if order == "before":
        cpu_offload(pipe.transformer, execution_device="cpu")
    with mmattn.attach(pipe, "identity") as session:
        if order == "after":
            cpu_offload(pipe.transformer, execution_device="cpu")
        assert torch.equal(draw(pipe), stock)
        assert session.stats.executed == session.stats.planned
    assert torch.equal(draw(pipe), stock)
    remove_hook_from_module(pipe.transformer, recurse=True)
    assert torch.equal(draw(pipe), stock)


def test_attention_backend_is_honoured_and_kept(parts):
    """A backend chosen while attached runs, and stays chosen after detaching."""
    pipe = _flux(parts)
    model = pipe.transformer
    with mmattn.attach(pipe, "identity"):
        model.set_attention_backend("_native_math")
        chosen = {p._attention_backend for p in model.attn_processors.values()}
        assert {str(c.value) for c in chosen} == {"_native_math"}
        attached = draw(pipe)
    assert {p._attention_backend for p in model.attn_processors.values()} == chosen
    assert torch.equal(draw(pipe), attached)
    model.reset_attention_backend()
    diffusers.models.attention_dispatch._AttentionBackendRegistry.set_active_backend("native")
    plain = draw(pipe)
    with diffusers.attention_backend("_native_math"):
        math = draw(pipe)
    assert torch.equal(math, attached) and not torch.equal(plain, attached)
    assert {p._attention_backend for p in model.attn_processors.values()} == {None}


def test_processors_made_from_our_class_are_plain(parts):
    """``type(attn.processor)()`` while attached makes a processor of no site, running stock code."""
    pipe = _sd(parts)
    stock = draw(pipe)
    session = mmattn.attach(pipe, Zeroed(), sites="*mid_block*")
    assert distance(draw(pipe), stock) > 1e-6
    attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0]
    for module in (attention.attn1, attention.attn2):
        module.set_processor(type(module.processor)())
    with pytest.raises(mmattn.DetachConflict):
        session.detach()
    assert torch.equal(draw(pipe), stock)


def test_two_pipelines_are_independent(parts):
    first, second = _flux(parts), _flux(parts)
    stock = draw(second)
    with mmattn.attach(first, Zeroed()) as session:
        assert torch.equal(draw(second), stock) and session.stats.calls == 0
        with mmattn.attach(second, Watch()) as other:
            draw(first)
            assert other.clock.index is None and session.clock.index == STEPS
            assert other.stats.calls == 0 < session.stats.calls
            draw(second)
            assert other.clock.index == STEPS
    assert torch.equal(draw(second), stock) and torch.equal(draw(first), stock)


def test_attaching_twice_is_a_conflict(shared):
    pipe = shared["flux"]
    with mmattn.attach(pipe, "identity"):
        before = snapshot(pipe)
        with pytest.raises(mmattn.ConflictError, match="already belongs"):
            mmattn.attach(pipe, Zeroed())
        assert snapshot(pipe) == before


def test_shared_scheduler_is_a_conflict_before_anything_changes(parts):
    first, second = _flux(parts), _flux(parts)
    second.register_modules(scheduler=first.scheduler)
    stock, before = draw(second), snapshot(second)
    watch = Watch()
    with mmattn.attach(first, watch) as session:
        observed = type(first.scheduler)
        with pytest.raises(mmattn.ConflictError, match="from_config"):
            mmattn.attach(second, "identity")
        assert type(first.scheduler) is observed
        draw(first)
        assert session.clock.index == STEPS and len(watch.seen) == STEPS
    assert snapshot(second) == before
    assert torch.equal(draw(second), stock)


def test_session_on_the_transformer_alone(shared):
    """Attaching to ``pipe.transformer`` works too; only the clock is missing."""
    pipe = shared["wan"]
    stock = draw(pipe)
    with mmattn.attach(pipe.transformer, "identity") as session:
        assert torch.equal(draw(pipe), stock)
    assert session.stats.executed == session.stats.planned > 0
    assert session.clock.index is None


def test_compiled_transformer_in_a_pipeline(parts):
    """The wrapper of `torch.compile` inside a pipeline: branches and grid are known, output is equal."""
    pipe = _flux(parts)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager", fullgraph=True)
    arguments = {"negative_prompt": "a blue square", "true_cfg_scale": 2.0}
    stock = draw(pipe, **arguments)
    with mmattn.attach(pipe, "identity") as session:
        assert torch.equal(draw(pipe, **arguments), stock)
        assert session.stats.executed == session.stats.planned > 0
        assert session.stats.calls == session.stats.planned * STEPS * 2
        run = session.runs[0]
        assert run.branch == 1 and run.layout.grid == (1, 4, 6)
    assert torch.equal(draw(pipe, **arguments), stock)
