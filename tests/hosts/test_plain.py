"""Any nn.Module: own SDPA modules in every spelling, nn.MultiheadAttention, torch's encoder layers."""

import re

import pytest
import torch
import torch.nn.functional as F
from host_contract import (
    Calls,
    NoMasks,
    ShiftTokens,
    Zeroed,
    ZeroHeads,
    check_contract,
    distance,
)
from torch import nn
from torch.nn.functional import multi_head_attention_forward, scaled_dot_product_attention

import mmattn


class Base(nn.Module):
    def __init__(self, dim=16, heads=4):
        super().__init__()
        self.qkv, self.num_heads = nn.Linear(dim, 3 * dim), heads

    def split(self, x):
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)


class ByF(Base):
    def forward(self, x):
        return F.scaled_dot_product_attention(*self.split(x)).transpose(1, 2).flatten(2)


class ByName(Base):
    def forward(self, x):
        return scaled_dot_product_attention(*self.split(x)).transpose(1, 2).flatten(2)


class ByNN(Base):
    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(*self.split(x)).transpose(1, 2).flatten(2)


class ByTorch(Base):
    def forward(self, x):
        q, k, v = self.split(x)
        x = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return x.transpose(1, 2).flatten(2)


class ByHand(Base):
    def forward(self, x):
        q, k, v = self.split(x)
        return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)


class ByMHA(nn.Module):
    def __init__(self, weights=False, **kwargs):
        super().__init__()
        self.attn, self.weights = nn.MultiheadAttention(16, 4, batch_first=True, **kwargs), weights

    def forward(self, x):
        return self.attn(x, x, x, need_weights=self.weights)[0]


def encoder(layers=2, **kwargs):
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, **kwargs)
    return nn.TransformerEncoder(
        layer, layers, enable_nested_tensor=not kwargs.get("norm_first")
    ).eval()


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(2, 6, 16)


MODELS = {
    "F": (lambda: nn.Sequential(ByF(), ByF()), 2),
    "name": (lambda: nn.Sequential(ByName()), 1),
    "nn": (lambda: nn.Sequential(ByNN()), 1),
    "torch": (lambda: nn.Sequential(ByTorch()), 1),
    "mha": (lambda: nn.Sequential(ByMHA(), ByMHA(bias=False), ByMHA(add_zero_attn=True)), 3),
    "mixed": (lambda: nn.Sequential(ByHand(), ByF(), ByMHA()), 2),
    "encoder": (encoder, 2),
    "encoder-norm-first": (lambda: encoder(norm_first=True), 2),
    "root-is-attention": (ByF, 1),
}


@pytest.mark.parametrize("key", MODELS)
def test_contract(key, x):
    make, count = MODELS[key]
    check_contract(make().eval(), lambda m: m(x), expect_sites=count)


@pytest.mark.parametrize("key", MODELS)
def test_methods_act(key, x):
    make, count = MODELS[key]
    model = make().eval()
    with torch.no_grad():
        stock = model(x)
        with mmattn.attach(model, Calls()) as session:
            assert distance(model(x), stock) < 1e-5
            assert session.stats.executed == session.stats.calls == count
        for method in (Zeroed(), ZeroHeads()):
            with mmattn.attach(model, method) as session:
                assert distance(model(x), stock) > 1e-3
            assert session.stats.executed == count
        assert torch.equal(model(x), stock)


@pytest.mark.parametrize("key", ["mha", "encoder"])
def test_fast_path_compiles_and_trains(key, x):
    make, _ = MODELS[key]
    model = make().eval()
    check_contract(model, lambda m: m(x), deep_copy=False, interrupt=False, compiled=True)

    def grads():
        model.zero_grad()
        model(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    want = grads()
    with mmattn.attach(model, "identity"):
        assert all(map(torch.equal, want, grads()))
    with mmattn.attach(model, Calls()):
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(want, grads(), strict=True))


def test_padded_encoder_batches_stay_dense_tensors(x):
    model = encoder()
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    with torch.no_grad():
        stock = model(x, src_key_padding_mask=padding)
        with mmattn.attach(model, "identity"):
            assert torch.equal(model(x, src_key_padding_mask=padding), stock)
        with mmattn.attach(model, Calls()) as session:
            out = model(x, src_key_padding_mask=padding)
        assert session.stats.executed == 2
        assert torch.allclose(out[~padding], stock[~padding], atol=1e-5)
        with (
            pytest.raises(mmattn.UnsupportedCall, match="attention mask"),
            mmattn.attach(model, NoMasks()),
        ):
            model(x, src_key_padding_mask=padding)
        assert torch.equal(model(x, src_key_padding_mask=padding), stock)


def test_tokens_seam_of_encoder_layers(x):
    model = encoder()
    with torch.no_grad():
        stock = model(x)
        with mmattn.attach(model, ShiftTokens()) as session:
            assert distance(model(x), stock) > 1e-3
        assert session.stats.executed == 2 and session.stats.sites[0].tokens_kept == 6
        with mmattn.attach(model, ShiftTokens(0.0)):
            assert torch.equal(model(x), stock)
    with pytest.raises(mmattn.NoSiteError, match="no block with"):
        mmattn.attach(nn.Sequential(ByF()), ShiftTokens())


@pytest.mark.parametrize("wrap", [ByMHA])
def test_asking_for_weights_is_unsupported(wrap, x):
    model = nn.Sequential(wrap(weights=True)).eval()
    with torch.no_grad():
        stock = model(x)
        with mmattn.attach(model, "identity") as session:
            assert torch.equal(model(x), stock) and session.stats.executed == 1
        with (
            pytest.raises(mmattn.UnsupportedCall, match="need_weights=True"),
            mmattn.attach(model, Zeroed()),
        ):
            model(x)
        with mmattn.attach(model, Zeroed(), unsupported="dense") as session:
            assert torch.equal(model(x), stock)
        assert session.stats.dense_calls == 1


@pytest.mark.parametrize("weights", [True, False])
def test_direct_calls_of_the_functional_form(weights, x):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.m = nn.Linear(16, 48)
            self.out = nn.Linear(16, 16)

        def forward(self, x):
            t = x.transpose(0, 1)
            packed = (self.m.weight, self.m.bias, None, None, False, 0.0)
            rest = (self.out.weight, self.out.bias)
            return multi_head_attention_forward(
                t, t, t, 16, 4, *packed, *rest, self.training, None, weights
            )[0].transpose(0, 1)

    model = Functional().eval()
    with torch.no_grad():
        stock = model(x)
        if weights:
            with pytest.raises(mmattn.UnsupportedCall), mmattn.attach(model, Calls()):
                model(x)
            with mmattn.attach(model, "identity") as session:
                assert torch.equal(model(x), stock) and session.stats.executed == 1
            return
        check_contract(model, lambda m: m(x), expect_sites=1)
        with mmattn.attach(model, Zeroed()):
            assert distance(model(x), stock) > 1e-3


def test_a_function_mode_does_not_hide_the_seam(x):
    model = nn.Sequential(ByMHA(), ByF()).eval()
    with torch.no_grad(), mmattn.attach(model, Zeroed()) as session, torch.device("cpu"):
        model(x)
        assert session.stats.executed == 2


def test_decoder_layers_have_cross_sites(x):
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 32, batch_first=True), 1).eval()
    plan = mmattn.plan(model, "identity")
    assert [row.site.kind for row in plan.rows] == ["self", "cross"]
    memory = torch.randn(2, 5, 16)
    check_contract(model, lambda m: m(x, memory), expect_sites=2)
    with mmattn.attach(model, Calls()) as session:
        model(x, memory)
    assert [(s.notes["queries"], s.notes["keys"]) for s in session.stats.sites] == [(6, 6), (6, 5)]


def test_sites_name_modules_by_glob_regex_predicate_and_list():
    model = nn.Sequential(ByF(), ByHand(), ByF(), ByMHA())

    def paths(selector):
        return [row.site.path for row in mmattn.plan(model, Calls(), sites=selector).rows]

    assert paths("0") == ["0"] and paths("[02]") == ["0", "2"]
    assert paths(re.compile(r"^\d$")) == ["0", "2"]
    assert paths(lambda site: isinstance(site.module, nn.MultiheadAttention)) == ["3.attn"]
    assert paths(["2", "3.*"]) == ["2", "3.attn"]
    assert paths("*") == ["0", "2", "3.attn"]


def test_sites_that_cannot_be_reached_are_named(x):
    model = nn.Sequential(ByF(), ByHand())
    with pytest.raises(mmattn.NoSiteError, match=r"names 1 \(ByHand\).*Sites here: \['0'\]"):
        mmattn.attach(model, Calls(), sites="1")
    with pytest.raises(mmattn.NoSiteError, match=r"0\.qkv \(Linear\)"):
        mmattn.attach(model, Calls(), sites=["0", "0.qkv"])
    with pytest.raises(mmattn.NoSiteError, match=r"names 1 \(ByHand\)"):
        mmattn.attach(model, Calls(), sites=lambda site: type(site.module) is ByHand)
    with pytest.raises(mmattn.SelectorError, match="matches none"):
        mmattn.attach(model, Calls(), sites="decoder.*")
    with pytest.raises(mmattn.NoSiteError, match="has no attention site"):
        mmattn.attach(nn.Sequential(ByHand()), Calls())
    assert type(model[0]) is ByF and model(x).shape == x.shape


def test_compiled_wrappers_are_unwrapped(x):
    model = nn.Sequential(ByF()).eval()
    torch._dynamo.reset()
    optimised = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        stock = optimised(x)
        with mmattn.attach(optimised, Zeroed()) as session:
            assert [s.path for s in session.stats.sites] == ["0"]
            assert not torch.equal(optimised(x), stock) and session.stats.executed == 1
        assert torch.equal(optimised(x), stock)
