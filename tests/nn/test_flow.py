"""Flow-Attention: published golden numbers, conservation, and sums written out."""

import math

import pytest
import timm
import torch

from mmattn.errors import ConfigError, UnsupportedCall
from mmattn.nn.flow import FlowAttention, FlowSelfAttention, flow_attention, flows


def filled(module: torch.nn.Module) -> torch.nn.Module:
    """Parameters as the golden numbers want them: a sine over the elements, in order of names."""
    for k, (_, p) in enumerate(sorted(module.named_parameters())):
        ramp = torch.arange(p.numel(), dtype=torch.float64)
        p.data = (0.3 * torch.sin(1 + 0.7 * k + 0.37 * ramp)).view(p.shape)
    return module.double().eval()


def ramp_input(*shape: int, phase: float = 0.2) -> torch.Tensor:
    return torch.cos(0.11 * torch.arange(math.prod(shape), dtype=torch.float64) + phase).view(shape)


def check(out: torch.Tensor, total: float, norm: float, first: list[float]) -> None:
    out = out.detach().flatten()
    assert out.sum().item() == pytest.approx(total, abs=2e-9)
    assert out.norm().item() == pytest.approx(norm, abs=2e-9)
    assert out[:4].tolist() == pytest.approx(first, abs=6e-9)


def test_golden_numbers_of_the_published_layer():
    layer = filled(FlowAttention(10, 12, 8, 3))
    q, k, v = ramp_input(2, 7, 10), ramp_input(2, 5, 10, phase=0.5), ramp_input(2, 5, 10, phase=0.9)
    first = [0.10454961, -0.23332788, 0.28272451, 0.08235139]
    check(layer(q, k, v), -14.3746440454, 3.3145563708, first)


def test_golden_numbers_of_the_published_causal_layer():
    layer = filled(FlowAttention(10, 12, 8, 3, causal=True))
    first = [0.00428053, -0.0382022, 0.27800306, -0.11023384]
    check(layer(ramp_input(2, 7, 10)), -14.4593462590, 3.4567800631, first)


def heads(n: int, m: int, d: int = 4, dtype: torch.dtype = torch.float64) -> tuple:
    return tuple(torch.randn(2, 3, x, d, dtype=dtype) for x in (n, m, m))


def loop(q, k, v, causal):
    """One head of one item, from the paper's equations, token by token."""
    n, m, e = len(q), len(k), 1e-6
    sinks, sources = q.sigmoid(), k.sigmoid()
    out = torch.zeros(n, v.shape[1], dtype=q.dtype)

    def upto(x, i):
        return x[: i + 1].sum(0) if causal else x.sum(0)

    t = torch.arange(1.0, max(n, m) + 1, dtype=q.dtype) if causal else torch.ones(max(n, m))
    incoming = torch.stack([(sinks[i] + e) @ (upto(sources, i) + e) for i in range(n)])
    outgoing = torch.stack([(sources[j] + e) @ (upto(sinks, j) + e) for j in range(m)])
    sent = torch.stack([sources[j] * t[j] / outgoing[j] for j in range(m)])
    got = torch.stack([sinks[i] * t[i] / incoming[i] for i in range(n)])
    kept = torch.stack([(sinks[i] + e) @ (upto(sent, i) + e) / t[i] for i in range(n)])
    rivals = torch.stack([(sources[j] + e) @ (upto(got, j) + e) / t[j] for j in range(m)])
    rivals = rivals.clamp(-1, 1).exp()
    for i in range(n):
        for j in range(i + 1 if causal else m):
            c = rivals[j] / upto(rivals, j) * (j + 1 if causal else m)
            out[i] += (sinks[i] / incoming[i]) @ sources[j] * c * v[j]
        out[i] *= torch.sigmoid(kept[i] * (1 if causal else n / m))
    return out


@pytest.mark.parametrize(("n", "m", "causal"), [(5, 8, False), (9, 4, False), (7, 7, True)])
def test_equals_sums_written_out(n, m, causal):
    q, k, v = heads(n, m)
    out = flow_attention(q, k, v, causal=causal)
    for b in range(2):
        for h in range(3):
            expected = loop(q[b, h], k[b, h], v[b, h], causal)
            torch.testing.assert_close(out[b, h], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("n", "m"), [(6, 6), (5, 11)])
def test_flow_is_conserved(n, m):
    q, k, _ = heads(n, m)
    flow = flows(q.sigmoid(), k.sigmoid())
    for total, amount in (
        (flow.conserved_incoming.sum(-1), m),
        (flow.conserved_outgoing.sum(-1), n),
    ):
        torch.testing.assert_close(total, torch.full_like(total, amount), rtol=1e-4, atol=0)
    assert flow.incoming.std() > 0.1, "before conservation, amounts differ"


@pytest.mark.parametrize("length", [1, 63, 64, 150])
def test_causal_chunks_equal_running_sums(length):
    q, k, v = heads(length, length)
    out = flow_attention(q, k, v, causal=True)
    sinks, sources = q.sigmoid(), k.sigmoid()
    flow = flows(sinks, sources, causal=True)
    share = flow.conserved_outgoing.clamp(-1, 1).exp()
    t = torch.arange(1, length + 1)
    values = v * (share * t / share.cumsum(-1))[..., None]
    state = torch.einsum("bhnd,bhne->bhnde", sources, values).cumsum(2)
    expected = torch.einsum("bhnd,bhnde->bhne", sinks / flow.incoming[..., None], state)
    expected = expected * flow.conserved_incoming.sigmoid()[..., None]
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-10)


def test_causal_tokens_do_not_see_the_future():
    q, k, v = heads(80, 80)
    later = [torch.cat([x[:, :, :70], torch.randn(2, 3, 10, 4).double()], 2) for x in (q, k, v)]
    a, b = (flow_attention(*x, causal=True) for x in ((q, k, v), later))
    torch.testing.assert_close(a[:, :, :70], b[:, :, :70], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(a[:, :, 70:], b[:, :, 70:])
    full = [flow_attention(*x) for x in ((q, k, v), later)]
    assert not torch.allclose(full[0][:, :, :70], full[1][:, :, :70])


def test_order_of_tokens_does_not_matter():
    q, k, v = heads(6, 9)
    order = torch.randperm(9)
    out = flow_attention(q, k[:, :, order], v[:, :, order])
    torch.testing.assert_close(out, flow_attention(q, k, v), rtol=1e-12, atol=1e-12)


def test_one_token_keeps_a_share_of_its_value():
    q, k, v = heads(1, 1)
    share = flow_attention(q, k, v) / v
    expected = flows(q.sigmoid(), k.sigmoid()).conserved_incoming.sigmoid()[..., None]
    torch.testing.assert_close(share, expected.expand_as(share), rtol=1e-5, atol=0)


def test_half_precision_stays_near_for_many_tokens():
    q, k, v = heads(3000, 3000, dtype=torch.float32)
    half = flow_attention(*(x.half() for x in (q, k, v)))
    whole = flow_attention(*(x.half().float() for x in (q, k, v)))
    assert half.dtype == torch.float16 and (half - whole).norm() < 2e-3 * whole.norm()


def test_rows_of_a_batch_are_independent_and_gradients_flow():
    layer = FlowSelfAttention(12, 3)
    x = torch.randn(2, 10, 12, requires_grad=True)
    torch.testing.assert_close(layer(x)[1:], layer(x[1:]))
    layer(x).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in [x, *layer.parameters()])


def test_stands_where_attention_of_timm_does():
    model = timm.create_model(
        "vit_tiny_patch16_224", depth=2, embed_dim=48, num_classes=3, img_size=32
    ).eval()
    x = torch.randn(1, 3, 32, 32)
    before = model(x)
    for block in model.blocks:
        own = FlowSelfAttention(48, 3)
        own.load_state_dict(block.attn.state_dict())
        block.attn = own
    after = model(x)
    assert after.shape == before.shape and not torch.allclose(after, before)


@pytest.mark.parametrize("causal", [False, True])
def test_compiles_without_breaks(causal):
    q, k, v = heads(70, 70, dtype=torch.float32)
    compiled = torch.compile(flow_attention, fullgraph=True, backend="aot_eager")
    expected = flow_attention(q, k, v, causal=causal)
    torch.testing.assert_close(compiled(q, k, v, causal=causal), expected, rtol=1e-4, atol=1e-5)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="causal needs as many"):
        flow_attention(*heads(3, 4), causal=True)
    with pytest.raises(ConfigError, match="5 heads do not divide d_model 12"):
        FlowAttention(10, 12, 8, 5)
    with pytest.raises(ConfigError, match="5 heads do not divide dim 12"):
        FlowSelfAttention(12, 5)
    with pytest.raises(UnsupportedCall, match="a mask was given"):
        FlowSelfAttention(12, 3)(torch.randn(1, 2, 12), attn_mask=torch.ones(2, 2))
