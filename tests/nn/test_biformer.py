"""BiFormer: routed attention against loops and dense attention, models against published counts."""

import re

import pytest
import timm
import timm.optim
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import mmattn.nn.biformer as biformer
from mmattn.nn.biformer import BiLevelRoutingAttention, WholeAttention


def layer_of(regions=3, topk=2, padding="mask", dim=8, heads=2):
    torch.manual_seed(0)
    layer = BiLevelRoutingAttention(dim, heads, regions, topk, padding).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p) * 0.4)
    return layer


def loops(layer, image):
    """The layer for one image ``[Y, X, C]``, region by region; padded tokens are not there."""
    rows, cols, c = image.shape
    s, d = layer.regions, c // layer.num_heads
    high, wide = -(-rows // s), -(-cols // s)
    q, k, v = layer.qkv(image).split(c, dim=-1)
    region = [
        [(y, x) for y in range(rows) for x in range(cols) if (y // high, x // wide) == (a, b)]
        for a in range(s)
        for b in range(s)
    ]
    means = [
        [torch.stack([t[p] for p in cells]).mean(0) if cells else None for cells in region]
        for t in (q, k)
    ]
    out = torch.zeros_like(image)
    for i, cells in enumerate(region):
        if not cells:
            continue
        rated = [(means[0][i] @ m, j) for j, m in enumerate(means[1]) if m is not None]
        chosen = sorted(rated, key=lambda pair: -pair[0])[: layer.topk]
        seen = [p for _, j in chosen for p in region[j]]
        for p in cells:
            for m in range(layer.num_heads):
                part = slice(m * d, (m + 1) * d)
                scores = torch.stack([q[p][part] @ k[o][part] for o in seen]) * c**-0.5
                out[p][part] = scores.softmax(0) @ torch.stack([v[o][part] for o in seen])
    local = layer.value_conv(v.permute(2, 0, 1)[None])[0].permute(1, 2, 0)
    return layer.proj(out + local)


# Regions of 4 tokens take the masked path, those of 16 and more the kernel; both also with cut regions
# and with regions that are empty.
@pytest.mark.parametrize("grid", [(6, 6), (12, 12), (5, 4), (4, 10), (11, 13), (13, 10), (14, 12)])
def test_it_equals_the_loops(grid):
    layer = layer_of()
    x = torch.randn(2, *grid, 8, dtype=torch.float64)
    with torch.no_grad():
        out = layer(x)
        for row in range(2):
            torch.testing.assert_close(out[row], loops(layer, x[row]))
            torch.testing.assert_close(layer(x[row : row + 1])[0], out[row])


def test_empty_regions_are_never_seen():
    # 5 rows in 4 regions of 2: the last one holds nothing. Asking for all regions is dense attention.
    for grid in ((5, 5), (17, 17)):
        layer = layer_of(regions=4, topk=16)
        x = torch.randn(1, *grid, 8, dtype=torch.float64)
        torch.testing.assert_close(layer(x), dense(layer, x))


def dense(layer, x):
    q, k, v = (
        t.flatten(1, 2).unflatten(2, (layer.num_heads, -1)).transpose(1, 2)
        for t in layer.qkv(x).chunk(3, -1)
    )
    out = F.scaled_dot_product_attention(q, k, v, scale=x.shape[-1] ** -0.5)
    local = layer.value_conv(layer.qkv(x).chunk(3, -1)[2].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return layer.proj(out.transpose(1, 2).flatten(2).view(x.shape) + local)


@pytest.mark.parametrize("grid", [(6, 6), (12, 12)])
def test_all_regions_are_dense_attention_with_the_scale_of_all_channels(grid):
    layer = layer_of(topk=9)
    x = torch.randn(2, *grid, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(layer, x))


def test_legacy_padding_is_a_zero_padded_image_cut_afterwards():
    layer = layer_of(padding="legacy")
    x = torch.randn(1, 11, 13, 8, dtype=torch.float64)
    grown = F.pad(x, (0, 0, 0, 2, 0, 1))
    torch.testing.assert_close(layer(x), layer(grown)[:, :11, :13])
    assert (layer(x) - layer_of()(x)).abs().max() > 1e-3


def regions_of(layer, x):
    q, k, _ = layer._to_regions(layer.qkv(x)).chunk(3, -1)
    return layer.route(q, k, q.new_ones(1, *q.shape[1:3]))[:, 0]


@pytest.mark.parametrize("side", [6, 12])
def test_only_chosen_regions_matter(side):
    layer = layer_of()
    torch.nn.init.zeros_(layer.value_conv.weight)
    x = torch.randn(1, side, side, 8, dtype=torch.float64)
    graph = regions_of(layer, x)
    assert graph.sum().item() == 9 * 2 and graph.double().mean() < 0.25
    seen_by = graph[0].sum(0)
    target = int(((seen_by > 0) & (seen_by < 9)).nonzero()[0])
    # Two tokens of the target move apart by as much: the means, and with them the graph, stay.
    step = side // 3
    y, c = target // 3 * step, target % 3 * step
    other = x.clone()
    other[:, y, c] += 1
    other[:, y + 1, c] -= 1
    assert torch.equal(regions_of(layer, other), graph)
    changed = (layer(other) - layer(x)).abs().sum(-1)
    changed = layer._to_regions(changed[..., None])[0].amax((1, 2)) > 1e-9
    for region in set(range(9)) - {target}:
        assert changed[region] == graph[0, region, target]


def test_routing_passes_no_gradient_and_all_else_does():
    layer = layer_of()
    q, k = (torch.randn(1, 9, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert not layer.route(q, k, q.new_ones(1, 9, 4)).requires_grad
    for grid in ((6, 6), (12, 12), (13, 10)):
        layer.zero_grad()
        layer(torch.randn(1, *grid, 8, dtype=torch.float64)).square().sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in layer.parameters())


def test_routed_regions_are_closer_to_dense_attention_than_random_ones(monkeypatch):
    layer = layer_of(regions=4, topk=4, heads=1)
    with torch.no_grad():
        eye = torch.eye(8, dtype=torch.float64)
        layer.qkv.weight.copy_(torch.cat([2 * eye, 2 * eye, eye]))
        layer.qkv.bias.zero_()
    # Four kinds of regions, four of each, scattered over the map.
    kinds = 3 * F.normalize(torch.randn(4, 8, dtype=torch.float64), dim=1)
    kinds = kinds[torch.randperm(16) % 4].view(1, 4, 1, 4, 1, 8)
    x = kinds + 0.3 * torch.randn(1, 4, 4, 4, 4, 8, dtype=torch.float64)
    x = x.flatten(3, 4).flatten(1, 2)
    want = dense(layer, x)
    routed = (layer(x) - want).norm()
    errors = []
    for _ in range(5):
        graph = torch.rand(1, 1, 16, 16).argsort(-1) < layer.topk
        assert graph.sum() == regions_of(layer, x).sum()
        monkeypatch.setattr(layer, "route", lambda *_, graph=graph: graph)
        errors.append((layer(x) - want).norm())
        monkeypatch.undo()
    assert routed < 0.2 * min(errors)


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="number of regions"):
        BiLevelRoutingAttention(8, 2, 3, 10)
    with pytest.raises(ValueError, match="heads"):
        BiLevelRoutingAttention(8, 3)
    with pytest.raises(ValueError, match="padding"):
        BiLevelRoutingAttention(8, 2, padding="nchw")


@pytest.mark.parametrize(
    ("name", "params", "gmacs"),
    [
        ("biformer_tiny", 13_142_760, 2.216),
        pytest.param("biformer_small", 25_536_232, 4.464, marks=pytest.mark.slow),
        pytest.param("biformer_base", 56_804_968, 9.759, marks=pytest.mark.slow),
    ],
)
def test_counts(name, params, gmacs):
    model = timm.create_model(name, device="meta").eval()
    assert sum(p.numel() for p in model.parameters()) == params
    attention = 0

    def count(layer, args, _):
        nonlocal attention
        _, height, width, c = args[0].shape
        tokens, keys = height * width, height * width
        if isinstance(layer, BiLevelRoutingAttention):
            keys = layer.topk * tokens // layer.regions**2
            assert keys == 64
            attention += layer.regions**4 * c
        attention += 2 * tokens * keys * c

    for layer in model.modules():
        if isinstance(layer, BiLevelRoutingAttention | WholeAttention):
            layer.register_forward_hook(count)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    # Products of batches are those of attention, which the hooks count as the method needs them.
    flops = counter.get_flop_counts()["Global"]
    dense = sum(v for op, v in flops.items() if op is not torch.ops.aten.bmm) / 2
    assert round((dense + attention) / 1e9, 3) == gmacs


def small(**kwargs):
    torch.manual_seed(0)
    args = {"embed_dims": (8, 8, 16, 16), "depths": (1, 1, 2, 1), "head_dim": 4, "num_classes": 5}
    args |= {"regions": 4, "topks": (1, 2, 4, 0)}
    return timm.create_model("biformer_tiny", **(args | kwargs)).eval()


def test_official_checkpoints_load_by_name():
    model = small()
    renamed = {}
    for key, value in model.state_dict().items():
        key = re.sub(r"^stages\.(\d)\.downsample", r"downsample_layers.\1", key)
        key = key.replace(".blocks.", ".").replace("position", "pos_embed")
        key = key.replace("value_conv", "lepe").replace("fc1", "0").replace("fc2", "3")
        if not key.startswith("stages.3"):
            key = key.replace("attn.qkv", "attn.qkv.qkv").replace("attn.proj", "attn.wo")
        renamed[key.replace("head.fc", "head")] = value
    names = {
        "downsample_layers.0.3.weight",
        "stages.0.0.attn.qkv.qkv.bias",
        "stages.0.0.mlp.3.bias",
    }
    assert renamed.keys() >= names | {"stages.3.0.attn.qkv.weight", "stages.2.1.attn.wo.weight"}
    assert "stages.3.0.attn.qkv.bias" not in renamed
    back = biformer.checkpoint_filter_fn({"model": renamed}, model)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[k], v) for k, v in model.state_dict().items())


def test_the_last_stage_adds_a_convolution_of_its_input():
    layer = WholeAttention(16).double()
    x = torch.randn(1, 3, 3, 16, dtype=torch.float64)
    torch.nn.init.zeros_(layer.qkv.weight)
    local = layer.value_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x), layer.proj(local))


@pytest.mark.parametrize("size", [(64, 64), (96, 70)])
def test_any_resolution_and_independent_rows(size):
    model = small()
    image = torch.randn(2, 3, *size)
    out = model(image)
    torch.testing.assert_close(model(image[1:]), out[1:], rtol=1e-4, atol=1e-5)


def test_timm_interface():
    model = small(img_size=64)
    image = torch.randn(1, 3, 64, 64)
    features = model.forward_features(image)
    assert features.shape == (1, 16, 2, 2)
    assert model.forward_head(features, pre_logits=True).shape == (1, 16)
    maps = small(features_only=True)(image)
    assert [tuple(m.shape[2:]) for m in maps] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    model.reset_classifier(7, "max")
    assert model(image).shape == (1, 7) and model.get_classifier().out_features == 7
    groups = timm.optim.param_groups_layer_decay(model, layer_decay=0.5)
    assert len({g["lr_scale"] for g in groups}) > 4


def test_gradient_checkpointing_changes_no_gradient():
    image = torch.randn(2, 3, 64, 64)
    grads = []
    for enable in (False, True):
        model = small()
        model.set_grad_checkpointing(enable)
        model(image).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(plain, again)


def test_it_compiles_in_one_graph():
    model = small(embed_dims=(8, 16), depths=(1, 1), topks=(1, 0))
    image = torch.randn(1, 3, 64, 60)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(image), model(image))
