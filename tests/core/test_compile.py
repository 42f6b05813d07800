"""Seams under torch.compile: one graph per block, none per counter, two orders of attaching."""

import dataclasses
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

import mmattn
from mmattn.errors import SeamNotReached


class Attention(torch.nn.Module):
    """Self-attention of two heads."""

    def __init__(self):
        super().__init__()
        self.heads = 2
        self.qkv = torch.nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention()

    def forward(self, x):
        return x + self.attn(x)


class Net(torch.nn.Module):
    """Three equal blocks, the second of which may be skipped."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block() for _ in range(3))
        self.skip = False

    def forward(self, x):
        for i, block in enumerate(self.blocks):
            if not (self.skip and i == 1):
                x = block(x)
        return x


@dataclasses.dataclass(frozen=True)
class Halve(mmattn.Method):
    """Scales attention by `by` in the first half of the steps, and notes a density."""

    name: ClassVar[str] = "halve"
    hosts: ClassVar[tuple[str, ...]] = ("torch",)
    by: float = 0.5

    def phase(self, step, total):
        return None if step is None else step < total / 2

    def attend(self, q, k, v, *, mask, scale, site, dense):
        site.note("density", 0.5)
        out = dense(q, k, v)
        return out * self.by if site.phase is not False else out


class Graphs:
    """A backend that counts the graphs it is given."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, example):
        self.count += 1
        return graph


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def x():
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


def both(net, x):
    """Eager outputs: stock, and with the method."""
    stock = net(x)
    with mmattn.attach(net, Halve()):
        ours = net(x)
    assert not torch.equal(stock, ours)
    return stock, ours


def test_counters_make_no_graphs(net, x):
    stock, ours = both(net, x)
    graphs = Graphs()
    with mmattn.attach(net, Halve()) as session:
        compiled = torch.compile(net, fullgraph=True, backend=graphs)
        for n in range(1, 5):
            assert torch.equal(compiled(x), ours)
            assert [row.calls for row in session.stats.sites] == [n] * 3
        assert graphs.count == 1
        session.reset()
        compiled(x)
        assert [row.calls for row in session.stats.sites] == [1] * 3 and graphs.count == 1
    assert torch.equal(compiled(x), stock)


def test_one_graph_per_phase(net, x):
    """Eight steps, two phases, two graphs; a second run compiles nothing."""
    stock, ours = both(net, x)
    graphs = Graphs()
    with mmattn.attach(net, Halve()) as session:
        compiled = torch.compile(net, fullgraph=True, backend=graphs)
        for _ in range(2):
            for step in range(8):
                session.step(step, 8)
                assert torch.equal(compiled(x), ours if step < 4 else stock)
        assert graphs.count == 2
        assert session.stats.calls == 3 * 16


def test_attach_after_compile_and_detach(net, x):
    """The stock graph is used again after detaching; only attaching compiled something."""
    stock, ours = both(net, x)
    graphs = Graphs()
    compiled = torch.compile(net, fullgraph=True, backend=graphs)
    assert torch.equal(compiled(x), stock) and graphs.count == 1
    with mmattn.attach(compiled, Halve()) as session:
        assert torch.equal(compiled(x), ours)
        assert session.stats.executed == session.stats.planned == 3
        with session.disabled():
            assert torch.equal(compiled(x), stock)
            assert session.stats.calls == 3
        assert torch.equal(compiled(x), ours)
    attached = graphs.count
    assert torch.equal(compiled(x), stock)
    assert graphs.count == attached


@pytest.mark.parametrize("inplace", [False, True])
def test_blocks_share_one_graph(net, x, inplace):
    """Regional compile: three blocks, one graph, with the method inside."""
    stock, ours = both(net, x)
    counts = {}
    for attached in (False, True):
        torch._dynamo.reset()
        graphs = Graphs()
        session = mmattn.attach(net, Halve()) if attached else None
        for i, block in enumerate(net.blocks):
            if inplace:
                block.compile(fullgraph=True, backend=graphs)
            else:
                net.blocks[i] = torch.compile(block, fullgraph=True, backend=graphs)
        with torch.no_grad():  # else the first block, whose input needs no gradient, differs
            assert torch.equal(net(x), ours if attached else stock)
        counts[attached] = graphs.count
        if session:
            with torch.no_grad():
                net(x)
            assert [row.calls for row in session.stats.sites] == [2] * 3
            session.detach()
        for i, block in enumerate(net.blocks):
            net.blocks[i] = getattr(block, "_orig_mod", block)
            net.blocks[i]._compiled_call_impl = None
    assert counts == {False: 1, True: 1}


def test_batch_size_may_change(net, x):
    graphs = Graphs()
    with mmattn.attach(net, Halve()):
        compiled = torch.compile(net, fullgraph=True, backend=graphs)
        for batch in (2, 3, 4, 5):
            y = x[:1].expand(batch, -1, -1) * torch.arange(1, batch + 1)[:, None, None]
            assert torch.allclose(compiled(y), net(y), atol=1e-6)
        assert graphs.count <= 2


def test_gradients(net, x):
    def gradients(call):
        net.zero_grad()
        call(x).square().mean().backward()
        return [p.grad.clone() for p in net.parameters()]

    with mmattn.attach(net, Halve()):
        eager = gradients(net)
        traced = gradients(torch.compile(net, fullgraph=True, backend="aot_eager"))
    assert all(g.abs().sum() > 0 for g in eager)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(eager, traced, strict=True))


@pytest.mark.parametrize("first", ["attach", "compile"])
def test_site_that_was_not_reached(net, x, first):
    """Traced or not: leaving the block reports a planned site that never ran."""
    net.skip = True
    if first == "compile":
        compiled = torch.compile(net, fullgraph=True, backend="eager")
        with (
            pytest.raises(SeamNotReached, match=r"blocks\.1\.attn"),
            mmattn.attach(compiled, Halve()),
        ):
            compiled(x)
    else:
        with pytest.raises(SeamNotReached, match=r"blocks\.1\.attn"), mmattn.attach(net, Halve()):
            torch.compile(net, fullgraph=True, backend="eager")(x)


def test_in_place_compile_before_attaching(net, x):
    """Begin and end of a forward are seen outside the graph, so branches are told apart."""
    stock, ours = both(net, x)
    net.compile(fullgraph=True, backend="eager")
    call = net._compiled_call_impl
    with mmattn.attach(net, Halve()) as session:
        session.step(0, 4)
        for branch in (0, 1):
            assert torch.equal(net(x), ours)
            assert session.runs[0].branch == branch
        session.step(1, 4)
        net(x)
        assert session.runs[0].branch == 0 and session.runs[0].forwards == 3
    assert net._compiled_call_impl is call
    assert torch.equal(net(x), stock)
