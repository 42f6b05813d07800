"""Sparse methods on the video and high-resolution image families they are meant for."""

import diffusers_zoo as zoo
import pytest
import torch

import mmattn
from mmattn import (
    FlexPrefill,
    NeighborhoodAttention,
    ProxyAttn,
    RandomBlocks,
    SlidingWindow,
    SparseD,
    VMoBA,
)

FAMILIES = (
    "wan",
    "wan-i2v",
    "wan-vace",
    "hunyuan",
    "hunyuan15",
    "cogvideox",
    "ltx",
    "mochi",
    "flux",
    "sd3",
)
BLOCKS = {"block": 4, "dense_layers": 0}
METHODS = {
    "vmoba": VMoBA(topk=0.3, dense_steps=0),
    "vmoba head": VMoBA(threshold=0.2, kind="head", dense_steps=0),
    "neighborhood": NeighborhoodAttention(window=0.6),
    "sliding window": SlidingWindow(window=0.4),
    "random": RandomBlocks(density=0.4, **BLOCKS),
    "proxyattn": ProxyAttn(gamma=0.3, min_budget=4, stride=1, **BLOCKS),
    "flexprefill": FlexPrefill(gamma=0.3, min_budget=4, **BLOCKS),
    "sparsed": SparseD(select=0.3, dense_steps=1, **BLOCKS),
}
GRID = (3, 6, 6)


def grid_of(family):
    return (1, 6, 10) if zoo.ZOO[family].grid[0] == 1 else GRID


def sparse_call(session, model, inputs):
    """A forward in the second step; SparseD takes its pattern from the first."""
    session.step(0, 3)
    zoo.call(model, inputs)
    session.step(1, 3)
    before = {s.path: s.calls for s in session.stats.sites}
    out = zoo.call(model, inputs)
    assert all(s.calls > before[s.path] for s in session.stats.sites)
    return out


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_runs_sparse_in_every_family_and_leaves_no_trace(family, method):
    model, inputs = zoo.shared(family), zoo.inputs(family, 1, grid_of(family))
    before = zoo.call(model, inputs)
    with mmattn.attach(model, method, probe=True) as session:
        out = sparse_call(session, model, inputs)
        stats = session.stats
    assert stats.executed == stats.planned >= 2
    for site in stats.sites:
        assert site.density < 1 and 0 < site.recall < 1, site.path
        assert site.steps[1] < 0.85, (site.path, site.steps)
    assert torch.isfinite(out).all() and not torch.allclose(out, before, atol=1e-6)
    assert torch.equal(zoo.call(model, inputs), before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_batch_of_two_is_two_calls(family, method):
    model, both = zoo.shared(family), zoo.inputs(family, 2, grid_of(family))
    for name, value in both.items():  # rows that differ
        # HunyuanVideo 1.5 looks at all rows' images at once to tell text-to-video from the rest.
        if name != "image_embeds" and torch.is_tensor(value) and value.ndim > 2:
            value[1] = zoo.rand(*value.shape[1:], seed=7)
    rows = [
        {
            k: v[i : i + 1] if torch.is_tensor(v) and v.shape[:1] == (2,) else v
            for k, v in both.items()
        }
        for i in range(2)
    ]
    with mmattn.attach(model, method) as session:
        together = sparse_call(session, model, both)
        alone = []
        for row in rows:
            session.reset()
            alone.append(sparse_call(session, model, row))
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("family", ["hunyuan", "hunyuan15", "mochi"])
def test_padded_text_is_never_seen(family, method):
    """Two rows with text of different length; what stands in the padding must not matter."""
    model, inputs = zoo.shared(family), zoo.inputs(family, 2, GRID)
    inputs["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).to(
        inputs["encoder_attention_mask"].dtype
    )
    other = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].clone()}
    other["encoder_hidden_states"][1, 2:] = 50.0
    seen = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].clone()}
    seen["encoder_hidden_states"][1, :2] *= -1
    with mmattn.attach(model, method) as session:
        out = sparse_call(session, model, inputs)
        session.reset()
        padding_changed = sparse_call(session, model, other)
        session.reset()
        text_changed = sparse_call(session, model, seen)
        assert min(s.steps[1] for s in session.stats.sites) < 0.85
    torch.testing.assert_close(padding_changed, out, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(text_changed[0], out[0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(text_changed[1], out[1], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_is_the_untouched_model_bitwise(family):
    model, inputs = zoo.shared(family), zoo.inputs(family, 1, grid_of(family))
    before = zoo.call(model, inputs)
    for method in (
        VMoBA(topk=10**6, dense_steps=0),
        NeighborhoodAttention(window=10**6),
        RandomBlocks(density=1.0),
        SparseD(select=1.0, dense_steps=1),
    ):
        with mmattn.attach(model, method) as session:
            assert torch.equal(sparse_call(session, model, inputs), before)
            assert {s.density for s in session.stats.sites} == {1.0}


def test_lora_compile_and_vmoba_together():
    """An adapter is added, the model compiled, VMoBA attached: all three act, none breaks another."""
    peft = pytest.importorskip("peft", reason="LoRA needs the extra [train]")
    model, inputs = zoo.model("wan"), zoo.inputs("wan", 1, GRID)
    model.add_adapter(
        peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), "extra"
    )
    method = VMoBA(topk=0.3, dense_steps=0)
    dense = zoo.call(model, inputs)
    with mmattn.attach(model, method):
        eager = zoo.call(model, inputs)
    model.disable_adapters()
    with mmattn.attach(model, method):
        assert not torch.allclose(zoo.call(model, inputs), eager, atol=1e-5)
    model.enable_adapters()
    model.compile(fullgraph=True, backend="eager")
    with mmattn.attach(model, method) as session:
        compiled = zoo.call(model, inputs)
        assert session.stats.executed == 2
    torch.testing.assert_close(compiled, eager)
    assert not torch.allclose(eager, dense, atol=1e-5)
    torch.testing.assert_close(zoo.call(model, inputs), dense)
