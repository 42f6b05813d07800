"""Plan, attach, session and detach on a small plain model: the semantics every host shares."""

import copy
import re
import threading
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

import mmattn


class Attention(torch.nn.Module):
    def __init__(self, dim=8, heads=2):
        super().__init__()
        self.qkv, self.heads = torch.nn.Linear(dim, 3 * dim), heads

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Model(torch.nn.Module):
    def __init__(self, skip_last=False):
        super().__init__()
        self.layers = torch.nn.ModuleList([Attention() for _ in range(3)])
        self.skip_last = skip_last

    def forward(self, x):
        for layer in self.layers[: -1 if self.skip_last else None]:
            x = x + layer(x)
        return x


@dataclass(frozen=True)
class Scale(mmattn.Method):
    """Scales the values; counts itself. For these tests."""

    name: ClassVar[str] = "scale"
    factor: float = 2.0

    def attend(self, q, k, v, *, mask, scale, site, dense):
        site.state["seen"] = site.state.get("seen", 0) + 1
        site.note("density", 0.5)
        return dense(q, k, v * self.factor)


@dataclass(frozen=True)
class Zero(mmattn.Method):
    """Zeroes per-head outputs through the heads seam."""

    name: ClassVar[str] = "zero"
    seams: ClassVar[tuple[str, ...]] = ("heads",)

    def heads(self, out, *, site):
        return out * torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)


@dataclass(frozen=True)
class Refuses(mmattn.Method):
    """Refuses calls with an odd number of tokens."""

    name: ClassVar[str] = "refuses"

    def attend(self, q, k, v, *, mask, scale, site, dense):
        if q.shape[2] % 2:
            raise mmattn.UnsupportedCall("odd number of tokens")
        return dense(q, k, v)


@dataclass(frozen=True)
class Draws(mmattn.Method):
    """Random values from the session's generator."""

    name: ClassVar[str] = "draws"

    def attend(self, q, k, v, *, mask, scale, site, dense):
        return dense(q, k, torch.rand(v.shape, generator=site.generator()))


@pytest.fixture
def model():
    return Model().eval()


@pytest.fixture
def x():
    return torch.randn(2, 6, 8)


def test_plan_touches_nothing_and_lists_every_site(model, x):
    before = model(x)
    plan = mmattn.plan(model, Scale())
    assert plan.planned == 3
    text = str(plan)
    assert "3 of 3 sites" in text and "layers.2" in text
    assert plan.to_dict()["rows"][0]["methods"] == ["scale"]
    assert torch.equal(model(x), before)
    assert all(type(layer) is Attention for layer in model.layers)


def test_attach_acts_counts_and_detaches_bitwise(model, x):
    before = model(x)
    with mmattn.attach(model, Scale()) as session:
        assert not torch.allclose(model(x), before)
        stats = session.stats
        assert (stats.planned, stats.executed, stats.calls) == (3, 3, 3)
        assert stats.density == 0.5 and stats.sites[0].path == "layers.0"
        report = session.report()
    assert re.search(r"3 of 3 planned sites executed, 3 calls", report)
    assert torch.equal(model(x), before)
    assert all(type(layer) is Attention for layer in model.layers)
    session.detach()


def test_a_string_and_a_list_are_accepted(model, x):
    before = model(x)
    with mmattn.attach(model, ["identity", Scale(1.0)]) as session:
        assert torch.equal(model(x), before)
        assert session.stats.sites[0].methods == ("identity", "scale")


def test_disabled_is_the_stock_model(model, x):
    before = model(x)
    with mmattn.attach(model, Scale()) as session:
        model(x)
        with session.disabled():
            assert torch.equal(model(x), before)
        assert session.stats.calls == 3
        assert not torch.equal(model(x), before)


def test_reset_clears_counters(model, x):
    with mmattn.attach(model, Scale()) as session:
        model(x)
        session.reset()
        assert session.stats.calls == 0 and session.stats.density is None
        model(x)
        assert session.stats.calls == 3


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_detached_after_an_exception(model, x, error):
    before = model(x)

    class Boom(torch.nn.Module):
        def forward(self, x):
            raise error

    with pytest.raises(error), mmattn.attach(model, Scale()):
        model.layers.append(Boom())
        model(x)
    del model.layers[-1]
    assert torch.equal(model(x), before)
    assert all(type(layer) is Attention for layer in model.layers)
    assert not model._forward_pre_hooks and not model._forward_hooks


def test_attach_rolls_back_when_installing_fails(model, x, monkeypatch):
    from mmattn.hosts.base import ClassSwap

    before = model(x)
    real = ClassSwap.install

    def failing(self):
        if self.path.endswith("2"):
            raise KeyboardInterrupt
        real(self)

    monkeypatch.setattr(ClassSwap, "install", failing)
    with pytest.raises(KeyboardInterrupt):
        mmattn.attach(model, Scale())
    assert torch.equal(model(x), before)
    assert all(type(layer) is Attention for layer in model.layers)


def test_selectors(model, x):
    with mmattn.attach(model, Scale(), sites="layers.1") as session:
        model(x)
        assert [s.path for s in session.stats.sites] == ["layers.1"]
    for selector in (re.compile(r"\.[01]$"), lambda s: s.index < 2, ["layers.0", "layers.1"]):
        assert mmattn.plan(model, Scale(), sites=selector).planned == 2


def test_selector_errors_name_the_nearest(model):
    with pytest.raises(mmattn.SelectorError, match=r"layers\.[0-2]"):
        mmattn.plan(model, Scale(), sites="layer.1")
    with pytest.raises(mmattn.SelectorError, match="nothing"):
        mmattn.plan(model, Scale(), sites=["layers.0", "nothing"])


def test_no_site_is_an_error_not_silence():
    with pytest.raises(mmattn.NoSiteError, match="Linear"):
        mmattn.attach(torch.nn.Linear(2, 2), Scale())
    with pytest.raises(mmattn.NoSiteError, match="Cannot attach to a dict"):
        mmattn.attach({}, Scale())


def test_a_method_that_fits_nowhere_says_why(model):
    @dataclass(frozen=True)
    class CrossOnly(mmattn.Method):
        """For cross-attention."""

        name: ClassVar[str] = "cross-only"
        kinds: ClassVar[tuple[str, ...]] = ("cross",)

    with pytest.raises(mmattn.NoSiteError, match="kind self is not among cross"):
        mmattn.attach(model, CrossOnly())


def test_conflicts(model):
    with pytest.raises(mmattn.ConflictError, match="both replace the attention"):
        mmattn.attach(model, [Scale(), Draws()])
    with pytest.raises(mmattn.ConflictError, match="given twice"):
        mmattn.attach(model, [Scale(), Scale(3.0)])
    with (
        mmattn.attach(model, Scale()),
        pytest.raises(mmattn.ConflictError, match="already belongs"),
    ):
        mmattn.attach(model, Draws())
    mmattn.attach(model, Draws()).detach()


def test_different_sites_do_not_conflict_with_heads(model, x):
    before = model(x)
    with mmattn.attach(model, [Scale(1.0), Zero()]) as session:
        out = model(x)
        assert session.stats.calls == 3
    assert not torch.allclose(out, before)


def test_unsupported_raises_at_the_first_call_or_is_counted(model, x):
    odd = torch.randn(1, 5, 8)
    with (
        pytest.raises(mmattn.UnsupportedCall, match="odd number"),
        mmattn.attach(model, Refuses()),
    ):
        model(odd)
    before = model(odd)
    with mmattn.attach(model, Refuses(), unsupported="dense") as session:
        assert torch.equal(model(odd), before)
        assert session.stats.dense_calls == 3
        assert session.stats.sites[0].dense == {"odd number of tokens": 1}
        assert "dense 3 times: odd number of tokens" in session.report()
    with pytest.raises(mmattn.ConfigError, match="did you mean 'dense'"):
        mmattn.attach(model, Refuses(), unsupported="dens")


def test_a_mask_the_method_cannot_honour(x):
    class Masked(Attention):
        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            mask = torch.ones(6, 6, dtype=torch.bool).tril()
            return (
                F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
            )

    class Causal(Attention):
        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            return (
                F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            )

    for cls, message in ((Masked, "attention mask"), (Causal, "causal")):
        model = torch.nn.Sequential(cls())
        with pytest.raises(mmattn.UnsupportedCall, match=message), mmattn.attach(model, Scale()):
            model(x)
        before = model(x)
        with mmattn.attach(model, "identity"):
            assert torch.equal(model(x), before)


def test_a_site_that_is_never_reached_raises(x):
    model = Model(skip_last=True)
    with (
        pytest.raises(mmattn.SeamNotReached, match=r"1 of 3 planned sites.*layers\.2"),
        mmattn.attach(model, Scale()),
    ):
        model(x)
    assert all(type(layer) is Attention for layer in model.layers)
    with mmattn.attach(model, Scale(), sites=["layers.0", "layers.1"]) as session:
        model(x)
        assert session.stats.executed == 2


def test_detach_conflict_when_someone_replaced_ours(model, x):
    session = mmattn.attach(model, Scale())

    class Else(Attention):
        pass

    ours = type(model.layers[0])
    model.layers[0].__class__ = Else
    with pytest.raises(mmattn.DetachConflict, match=r"layers\.0"):
        session.detach()
    assert type(model.layers[1]) is Attention, "what could be restored was restored"
    model.layers[0].__class__ = ours
    session.detach()
    assert type(model.layers[0]) is Attention


def test_random_methods_own_their_generator(model, x):
    state = torch.get_rng_state()
    outs = []
    for seed in (1, 1, 2):
        with mmattn.attach(model, Draws(), seed=seed):
            outs.append(model(x))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_copies_are_detached_and_independent(model, x):
    before = model(x)
    with mmattn.attach(model, Scale()) as session:
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x), before)
        assert session.stats.calls == 0
        with mmattn.attach(twin, Zero()) as other:
            twin(x)
            assert (session.stats.calls, other.stats.calls) == (0, 3)
        assert list(model.state_dict()) == list(twin.state_dict())


def test_gradients_flow_and_equal_the_stock_model(model, x):
    def grads():
        model.zero_grad()
        model(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    want = grads()
    with mmattn.attach(model, "identity") as session:
        got = grads()
        assert session.stats.calls == 3
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_manual_clock_phase_and_state(model, x):
    @dataclass(frozen=True)
    class Late(mmattn.Method):
        """Acts in the second half of the steps."""

        name: ClassVar[str] = "late"

        def phase(self, step, total):
            return None if step is None else step >= total / 2

        def attend(self, q, k, v, *, mask, scale, site, dense):
            return dense(q, k, v * 2) if site.phase else dense(q, k, v)

    before = model(x)
    with mmattn.attach(model, Late()) as session:
        changed = []
        for i in range(4):
            session.step(i, 4)
            changed.append(not torch.equal(model(x), before))
        assert changed == [False, False, True, True]
        with pytest.raises(mmattn.ConfigError, match="0 <= index < total"):
            session.step(4, 4)


def test_state_is_cleared_when_a_run_starts(model, x):
    with mmattn.attach(model, Scale()) as session:
        session.step(0, 2)
        model(x)
        sites = session.runs[0].sites

        def seen():
            return [state["seen"] for site in sites for state in site.memory.values()]

        assert seen() == [1, 1, 1]
        model(x)  # the second call of the same step is another branch
        assert {branch for site in sites for branch, *_ in site.memory} == {0, 1}
        session.step(1, 2)
        model(x)
        assert max(seen()) == 2
        session.step(0, 2)
        assert seen() == []


@pytest.mark.parametrize("when", ["before", "after"])
def test_compiled_without_graph_breaks(model, x, when):
    plain = model(x)
    if when == "before":
        session = mmattn.attach(model, Scale())
        compiled = torch.compile(model, fullgraph=True, backend="eager")
    else:
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), plain)
        session = mmattn.attach(compiled, Scale())
    with session:
        out = compiled(x)
        compiled(x)
        assert not torch.allclose(out, plain)
        assert (session.stats.executed, session.stats.calls) == (3, 6)
        with session.disabled():
            assert torch.allclose(compiled(x), plain)
    assert torch.allclose(compiled(x), plain)


def test_lock_serialises_threads(model, x):
    outs = {}
    with mmattn.attach(model, Scale()) as session:

        def work(i):
            with session.lock:
                outs[i] = model(x)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert session.stats.calls == 12
    assert all(torch.equal(outs[0], out) for out in outs.values())
