"""Agent attention as a layer: golden forwards, invariants, grids, checkpoints' names."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from mmattn.nn.agent import AgentAttention, GridBias, stretch
from mmattn.nn.agent_weights import convert_layer


def wave(*shape, phase=0.2, step=0.11):
    n = torch.Size(shape).numel()
    return torch.cos(step * torch.arange(n, dtype=torch.float64) + phase).view(shape)


def official_shapes(dim, heads, n, grid, kind, reduction=1):
    """Names and shapes of one official layer; kind: window, class or pyramid."""
    h, w = grid
    hk, wk = h // reduction, w // reduction
    shapes = {
        "an_bias": (heads, n, 7, 7),
        "na_bias": (heads, n, 7, 7),
        "ah_bias": (1, heads, n, hk, 1),
        "aw_bias": (1, heads, n, 1, wk),
        "ha_bias": (1, heads, h, 1, n),
        "wa_bias": (1, heads, 1, w, n),
        "dwc.weight": (dim, 1, 3, 3),
        "dwc.bias": (dim,),
        "proj.weight": (dim, dim),
        "proj.bias": (dim,),
    }
    if kind == "class":
        shapes |= {"ac_bias": (1, heads, n, 1), "ca_bias": (1, heads, 1, n)}
    for name, rows in {"q": 1, "kv": 2}.items() if kind == "pyramid" else [("qkv", 3)]:
        shapes |= {f"{name}.weight": (rows * dim, dim), f"{name}.bias": (rows * dim,)}
    if reduction > 1:
        shapes |= {"sr.weight": (dim, dim, reduction, reduction), "sr.bias": (dim,)}
        shapes |= {"norm.weight": (dim,), "norm.bias": (dim,)}
    return shapes


def golden_state(shapes):
    state = {}
    for k, name in enumerate(sorted(shapes)):
        n = torch.Size(shapes[name]).numel()
        flat = 0.3 * torch.sin(1 + 0.7 * k + 0.37 * torch.arange(n, dtype=torch.float64))
        state[name] = flat.view(shapes[name])
    return state


GOLDEN = {
    "window": ("window", 36, 1, 32.8781437087, 22.2889115795, [-1.21182061, 0.41281742, 0.9801936]),
    "class": ("class", 17, 1, -40.5408603492, 17.8908068443, [-0.30886182, 0.44129687, 0.78006599]),
    "pyramid": (
        "pyramid",
        36,
        1,
        -55.8785700228,
        20.583602695,
        [0.17461876, -0.53304476, 0.82084571],
    ),
    "reduced": (
        "pyramid",
        36,
        2,
        -37.987889868,
        18.5846534278,
        [1.06887651, -0.31216673, -0.65051143],
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_forward_equals_the_numbers_of_the_authors_layer(name):
    kind, tokens, reduction, total, norm, first = GOLDEN[name]
    grid = (4, 4) if kind == "class" else (6, 6)
    layer = AgentAttention(
        12, 3, 9, grid, prefix=int(kind == "class"), reduction=reduction
    ).double()
    state = golden_state(official_shapes(12, 3, 9, grid, kind, reduction))
    layer.load_state_dict(convert_layer(state, ""))
    out = layer.eval()(wave(2, tokens, 12), grid)
    assert out.sum().item() == pytest.approx(total, abs=1e-7)
    assert out.norm().item() == pytest.approx(norm, abs=1e-7)
    torch.testing.assert_close(
        out.flatten()[:3], torch.tensor(first, dtype=torch.float64), atol=1e-8, rtol=0
    )


def layer_of(grid=(4, 6), heads=2, n=4, **kwargs):
    torch.manual_seed(0)
    layer = AgentAttention(8, heads, n, grid, **kwargs).double().eval()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return layer


def without_extras(layer):
    """Only the two softmax attentions, with an output projection that changes nothing."""
    with torch.no_grad():
        for p in [*layer.key_bias.parameters(), *layer.query_bias.parameters()]:
            p.zero_()
        layer.value_conv.weight.zero_()
        layer.value_conv.bias.zero_()
        layer.proj.weight.copy_(torch.eye(layer.proj.weight.shape[0]))
        layer.proj.bias.zero_()
    return layer


def loops(layer, x, grid):
    """The layer, pair by pair, for one image."""
    n_tokens, c = x.shape
    p, heads, d = layer.prefix, layer.num_heads, c // layer.num_heads
    q, k, v = layer.qkv(x).split(c, dim=1)
    h, w = grid
    cells = [[q[p + y * w + i] for i in range(w)] for y in range(h)]
    agents = []
    for a, b in itertools.product(range(layer.side), repeat=2):
        rows = range(a * h // layer.side, -(-(a + 1) * h // layer.side))
        cols = range(b * w // layer.side, -(-(b + 1) * w // layer.side))
        agents.append(torch.stack([cells[y][i] for y in rows for i in cols]).mean(0))
    b1, b2 = layer.key_bias(grid), layer.query_bias(grid)
    out = torch.zeros_like(x)
    for m in range(heads):
        part = slice(m * d, (m + 1) * d)
        held = []
        for a, agent in enumerate(agents):
            scores = torch.stack([agent[part] @ k[j, part] for j in range(n_tokens)])
            held.append((scores * d**-0.5 + b1[m, a]).softmax(0) @ v[:, part])
        for i in range(n_tokens):
            scores = torch.stack([q[i, part] @ agent[part] for agent in agents])
            out[i, part] = (scores * d**-0.5 + b2[m, :, i]).softmax(0) @ torch.stack(held)
    local = layer.value_conv(v[p:].T.reshape(1, c, h, w))[0].flatten(1).T
    out[p:] += local
    return layer.proj(out)


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("grid", [(4, 6), (5, 3)])
def test_it_equals_the_loops_at_the_built_grid_and_at_another(prefix, grid):
    layer = layer_of(prefix=prefix)
    x = torch.randn(2, prefix + grid[0] * grid[1], 8, dtype=torch.float64)
    out = layer(x, grid)
    for row in range(2):
        torch.testing.assert_close(out[row], loops(layer, x[row], grid))
        torch.testing.assert_close(out[row : row + 1], layer(x[row : row + 1], grid))


def test_constant_values_come_out_constant():
    layer = without_extras(layer_of())
    with torch.no_grad():
        layer.qkv.weight[16:] = 0
    out = layer(torch.randn(1, 24, 8, dtype=torch.float64))
    torch.testing.assert_close(out, layer.qkv.bias[16:].expand(1, 24, 8))


def test_one_agent_per_token_is_softmax_attention_behind_a_softmax_over_queries():
    layer = without_extras(layer_of((4, 4), heads=2, n=16))
    x = torch.randn(1, 16, 8, dtype=torch.float64)
    q, k, v = (t.unflatten(2, (2, 4)).transpose(1, 2) for t in layer.qkv(x).chunk(3, -1))
    first = F.scaled_dot_product_attention(q, k, v)
    want = F.scaled_dot_product_attention(q, q, first).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(x), want)


def test_a_bias_that_no_softmax_can_see_changes_nothing():
    layer = layer_of()
    x = torch.randn(1, 24, 8, dtype=torch.float64)
    before = layer(x)
    with torch.no_grad():
        layer.key_bias.block += 3.0
        layer.query_bias.block += 2.0
    torch.testing.assert_close(layer(x), before)
    with torch.no_grad():
        layer.key_bias.block[:, :, 0] += 3.0
    assert (layer(x) - before).abs().max() > 1e-3


def test_mirrored_images_give_mirrored_outputs_without_biases():
    layer = without_extras(layer_of())
    x = torch.randn(1, 4, 6, 8, dtype=torch.float64)
    out = layer(x.flatten(1, 2)).view(1, 4, 6, 8)
    torch.testing.assert_close(layer(x.flip(2).flatten(1, 2)).view(1, 4, 6, 8), out.flip(2))


def test_a_prefix_token_gets_nothing_from_the_convolution():
    layer = layer_of(prefix=1)
    x = torch.randn(1, 25, 8, dtype=torch.float64)
    before = layer(x)
    with torch.no_grad():
        layer.value_conv.weight.mul_(3)
    after = layer(x)
    assert torch.equal(after[:, 0], before[:, 0])
    assert (after[:, 1:] - before[:, 1:]).abs().max() > 1e-3


@pytest.mark.parametrize("prefix", [0, 1])
def test_the_layer_adds_as_many_parameters_as_published(prefix):
    c, heads, n, (h, w) = 24, 3, 9, (5, 6)
    layer = AgentAttention(c, heads, n, (h, w), prefix=prefix)
    plain = 4 * c * c + 4 * c
    extra = 10 * c + heads * n * (98 + 2 * (h + w) + 2 * prefix)
    assert sum(p.numel() for p in layer.parameters()) == plain + extra


def test_tables_stretch_to_another_grid_and_stay_at_their_own():
    bias = GridBias(2, 4, (6, 4))
    assert stretch(bias.row, 6) is bias.row
    wide = bias((9, 8))
    assert wide.shape == (2, 4, 72)
    bias.set_grid((9, 8))
    torch.testing.assert_close(bias((9, 8)), wide)
    wide.sum().backward()


def test_gradients_reach_every_parameter():
    layer = AgentAttention(8, 2, 4, (4, 4), prefix=1).train()
    layer(torch.randn(2, 17, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="square number of agents"):
        AgentAttention(8, 2, 8, (4, 4))
    with pytest.raises(ValueError, match="heads"):
        AgentAttention(8, 3, 4, (4, 4))
    with pytest.raises(ValueError, match="prefix"):
        AgentAttention(8, 2, 4, (4, 4), prefix=1, reduction=2)
    layer = AgentAttention(8, 2, 4, (4, 6))
    with pytest.raises(ValueError, match="set_input_size"):
        layer(torch.zeros(1, 15, 8))
    with pytest.raises(ValueError, match="tokens for a grid"):
        layer(torch.zeros(1, 15, 8), (4, 4))
    with pytest.raises(ValueError, match="no mask"):
        layer(torch.zeros(1, 24, 8), is_causal=True)
