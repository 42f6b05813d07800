"""Every diffusers family keeps the host contract: identity, undo, copies, saving, training, compile."""

import collections
import copy

import diffusers
import pytest
import torch
from diffusers_zoo import ZOO, call, inputs, model, shared
from host_contract import Calls, Zeroed, check_contract, distance

import mmattn

COMPILED = ("flux", "sd3", "wan", "unet-small", "pixart")
REPEATED = ("flux", "wan-vace", "ltx", "unet-small")


@pytest.mark.parametrize("name", ZOO)
def test_contract(name):
    kwargs = inputs(name)
    sites = sum(ZOO[name].kinds.values())
    check_contract(shared(name), lambda m: call(m, kwargs), expect_sites=sites)


@pytest.mark.parametrize("name", ZOO)
def test_site_kinds(name):
    plan = mmattn.plan(shared(name), "identity")
    assert collections.Counter(row.site.kind for row in plan.rows) == ZOO[name].kinds
    assert {row.site.family for row in plan.rows} == {type(shared(name)).__name__}
    assert all(row.site.heads for row in plan.rows)


@pytest.mark.parametrize("name", ZOO)
def test_every_site_matters_and_rows_are_independent(name):
    """Emptying attention changes the output, so the sites are really on the path."""
    kwargs = inputs(name, batch=3)
    m = shared(name)
    stock = call(m, kwargs)
    with mmattn.attach(m, Zeroed()) as session:
        assert distance(call(m, kwargs), stock) > 1e-6
        assert session.stats.executed == session.stats.planned
    with mmattn.attach(m, Calls()) as session:
        assert distance(call(m, kwargs), stock) < 1e-4
    assert torch.equal(call(m, kwargs), stock)


def test_wan_image_to_video_attends_twice_per_call():
    """Image keys and text keys are two calls of one site, with memory of their own."""
    m, kwargs = shared("wan-i2v"), inputs("wan-i2v")
    seen = collections.defaultdict(list)

    class Remember(Calls):
        def attend(self, q, k, v, *, mask, scale, site, dense):
            seen[site.path, site.call].append(site.state.get("keys"))
            site.state["keys"] = k.shape[2]
            return dense(q, k, v)

    with mmattn.attach(m, Remember(), sites="*attn2"):
        call(m, kwargs)
        call(m, kwargs)
    assert sorted({place for _, place in seen}) == [0, 1]
    assert seen["blocks.0.attn2", 0] == [None, 6]
    assert seen["blocks.0.attn2", 1] == [None, 512]


@pytest.mark.parametrize("name", ["sana", "sana-video"])
def test_linear_attention_is_explained(name):
    plan = mmattn.plan(shared(name), "identity")
    assert all(row.site.path.endswith("attn2") for row in plan.rows)
    assert "2 attention modules are no sites" in str(plan)
    assert "linear attention" in str(plan)

    class SelfOnly(Calls):
        kinds = ("self",)

    with pytest.raises(mmattn.NoSiteError, match="linear attention"):
        mmattn.attach(shared(name), SelfOnly())


def test_processor_without_softmax_call_is_explained():
    m = model("unet")
    m.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    plan = mmattn.plan(m, "identity")
    assert plan.planned == 0 and "set another processor" in str(plan)
    with pytest.raises(mmattn.NoSiteError, match="set another processor"):
        mmattn.attach(m, "identity")


def test_processors_that_are_modules():
    """IP-Adapter processors carry weights and attend twice."""
    from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0

    m, kwargs = model("unet"), inputs("unet")
    torch.manual_seed(0)
    processors = {
        name: IPAdapterAttnProcessor2_0(
            m.get_submodule(name.removesuffix(".processor")).to_q.out_features, 16, num_tokens=(3,)
        )
        if "attn2" in name
        else AttnProcessor2_0()
        for name in m.attn_processors
    }
    m.set_attn_processor(processors)
    blocks = m.down_blocks[0].attentions[0].transformer_blocks[0]
    image = [torch.randn(1, 1, 3, 16, generator=torch.Generator().manual_seed(1))]

    class Pass(torch.nn.Module):
        def forward(self, embeds):
            return image

    m.encoder_hid_proj, m.config.encoder_hid_dim_type = Pass(), "ip_image_proj"
    kwargs = {**kwargs, "added_cond_kwargs": {"image_embeds": image}}
    check_contract(m, lambda m: call(m, kwargs), expect_sites=14, deep_copy=False)
    stock = call(m, kwargs)
    with mmattn.attach(m, Zeroed(), sites="*attn2") as session:
        assert distance(call(m, kwargs), stock) > 1e-6
        assert all(row.calls == 2 for row in session.stats.sites)
    assert type(blocks.attn2.processor) is IPAdapterAttnProcessor2_0


@pytest.mark.parametrize("name", ["flux", "sd3", "wan", "unet", "mochi"])
def test_save_while_attached(name, tmp_path):
    m, kwargs = shared(name), inputs(name)
    stock = call(m, kwargs)
    m.save_pretrained(tmp_path / "stock")
    with mmattn.attach(m, "identity"):
        m.save_pretrained(tmp_path / "attached")
        twin = copy.deepcopy(m)
    assert torch.equal(call(twin, kwargs), stock)
    config = (tmp_path / "attached" / "config.json").read_text()
    assert config == (tmp_path / "stock" / "config.json").read_text()
    loaded = type(m).from_pretrained(tmp_path / "attached").eval()
    assert type(loaded) is type(m) and loaded.config["_class_name"] == type(m).__name__
    saved, weights = loaded.state_dict(), m.state_dict()
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[k], weights[k]) for k in weights)
    # Mapped files are aligned differently from fresh tensors, so matrix products may round otherwise.
    assert distance(call(loaded, kwargs), stock) < 1e-5


@pytest.mark.parametrize("name", ["flux", "sd3", "wan", "mochi", "unet", "cogvideox"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_gradients(name, checkpointing):
    kwargs = inputs(name)

    def gradients(attached):
        m = model(name).train()
        if checkpointing:
            m.enable_gradient_checkpointing()
        session = mmattn.attach(m, "identity") if attached else None
        m(**kwargs)[0].square().mean().backward()
        if session:
            assert session.stats.executed == session.stats.planned
            session.detach()
        return {n: p.grad for n, p in m.named_parameters() if p.grad is not None}

    stock, ours = gradients(False), gradients(True)
    assert stock.keys() == ours.keys() and any(g.abs().sum() > 0 for g in ours.values())
    assert all(torch.equal(stock[n], ours[n]) for n in stock)


@pytest.mark.parametrize("name", COMPILED)
def test_attach_then_compile_without_graph_breaks(name):
    m, kwargs = shared(name), inputs(name)
    stock = call(m, kwargs)
    with mmattn.attach(m, "identity") as session:
        optimised = torch.compile(m, fullgraph=True, backend="eager")
        assert torch.equal(call(optimised, kwargs), stock)
        assert session.stats.executed == session.stats.planned
        assert all(row.calls == 1 for row in session.stats.sites)
        call(optimised, kwargs)
        assert all(row.calls == 2 for row in session.stats.sites)


@pytest.mark.parametrize("name", COMPILED)
def test_compile_then_attach_without_graph_breaks(name):
    m, kwargs = shared(name), inputs(name)
    stock = call(m, kwargs)
    optimised = torch.compile(m, fullgraph=True, backend="eager")
    assert torch.equal(call(optimised, kwargs), stock)
    with mmattn.attach(optimised, "identity") as session:
        assert torch.equal(call(optimised, kwargs), stock)
        assert session.stats.executed == session.stats.planned > 0
        grids = {site.layout.grid for run in session.runs for site in run.sites}
        assert grids == {ZOO[name].grid}
    assert torch.equal(call(optimised, kwargs), stock)
    assert not optimised._forward_pre_hooks and not optimised._forward_hooks


@pytest.mark.parametrize("name", ["flux"])
def test_compile_in_place(name):
    """``model.compile()`` before attaching: layout and counts are read outside the graph."""
    m, kwargs = model(name), inputs(name)
    stock = call(m, kwargs)
    m.compile(fullgraph=True, backend="eager")
    compiled = m._compiled_call_impl
    with mmattn.attach(m, "identity") as session:
        assert torch.equal(call(m, kwargs), stock)
        assert session.stats.executed == session.stats.planned
        assert {s.layout.grid for r in session.runs for s in r.sites} == {ZOO[name].grid}
        assert torch.equal(call(copy.deepcopy(m), kwargs), stock)
    assert m._compiled_call_impl is compiled
    assert torch.equal(call(m, kwargs), stock)


class _Graphs:
    """A backend that counts the graphs it is given."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, example):
        self.count += 1
        return graph


@pytest.mark.parametrize("name", REPEATED)
def test_regional_compile_makes_no_extra_graphs(name):
    kwargs = inputs(name)
    counts, outputs = {}, []
    for attached in (False, True):
        torch._dynamo.reset()
        m, graphs = model(name), _Graphs()
        session = mmattn.attach(m, "identity") if attached else None
        m.compile_repeated_blocks(fullgraph=True, backend=graphs)
        outputs.append(call(m, kwargs))
        counts[attached] = graphs.count
        if session:
            assert session.stats.executed == session.stats.planned
            assert torch.equal(*outputs)
            before = session.stats.calls
            call(m, kwargs)
            assert session.stats.calls == 2 * before
            assert graphs.count == counts[True], "the second forward compiled again"
    assert counts[True] == counts[False] > 0
