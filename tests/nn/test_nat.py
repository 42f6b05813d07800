"""NAT and DiNAT: attention against a loop, sizes against the published tables, timm's manners."""

import math
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay
from torch.utils.flop_counter import FlopCounterMode

from mmattn.errors import ConfigError
from mmattn.nn import nat
from mmattn.nn.nat import NAT, NeighborhoodAttention2d, fit_window, neighbors

SMALL = {
    "dim": 16,
    "depths": (1, 2, 1, 1),
    "num_heads": (2, 2, 4, 4),
    "dilations": ((2,), (1, 2), (1,), (1,)),
    "kernel_size": 3,
    "num_classes": 5,
}
PUBLISHED = {"mini": (20, 2.7), "tiny": (28, 4.3), "small": (51, 7.8), "base": (90, 13.7)}


def window_of(place: int, length: int, window: int, dilation: int) -> list[int]:
    """Keys one query sees on one axis, from the papers: nearest ones of its own residue class."""
    same = [i for i in range(length) if i % dilation == place % dilation]
    at = same.index(place)
    first = min(max(at - window // 2, 0), len(same) - window)
    return same[first : first + window]


def loop(attn: NeighborhoodAttention2d, x: torch.Tensor) -> torch.Tensor:
    """The layer of one image, token by token and head by head."""
    y, w, c = x.shape
    d = c // attn.num_heads
    q, k, v = attn.qkv(x).view(y, w, 3, attn.num_heads, d).unbind(2)
    out = torch.zeros(y, w, attn.num_heads, d, dtype=x.dtype)
    axes = [fit_window(n, attn.kernel_size, attn.dilation) for n in (y, w)]
    for i in range(y):
        for j in range(w):
            rows, columns = window_of(i, y, *axes[0]), window_of(j, w, *axes[1])
            seen = [(r, s) for r in rows for s in columns]
            for h in range(attn.num_heads):
                scores = torch.stack([q[i, j, h] @ k[r, s, h] / math.sqrt(d) for r, s in seen])
                if attn.rpb is not None:
                    middle = attn.kernel_size - 1
                    scores = scores + torch.stack(
                        [
                            attn.rpb[
                                h, (r - i) // axes[0][1] + middle, (s - j) // axes[1][1] + middle
                            ]
                            for r, s in seen
                        ]
                    )
                weights = scores.softmax(0)
                out[i, j, h] = sum(p * v[r, s, h] for p, (r, s) in zip(weights, seen, strict=True))
    return attn.proj(out.reshape(y, w, c))


@pytest.mark.parametrize("rel_pos_bias", [False, True])
@pytest.mark.parametrize(("grid", "dilation"), [((5, 7), 1), ((7, 9), 2), ((2, 4), 2)])
def test_layer_equals_a_loop_over_tokens(rel_pos_bias, grid, dilation):
    attn = NeighborhoodAttention2d(8, 2, 3, dilation, rel_pos_bias=rel_pos_bias).double()
    if rel_pos_bias:
        torch.nn.init.normal_(attn.rpb)
    x = torch.randn(2, *grid, 8, dtype=torch.float64)
    for got, image in zip(attn(x), x, strict=True):
        torch.testing.assert_close(got, loop(attn, image), rtol=0, atol=1e-12)


def test_bias_of_zero_changes_nothing_and_gradients_agree():
    plain, biased = (NeighborhoodAttention2d(8, 2, 3, rel_pos_bias=b).double() for b in (0, 1))
    biased.load_state_dict({**plain.state_dict(), "rpb": torch.zeros(2, 5, 5)})
    x = torch.randn(1, 6, 5, 8, dtype=torch.float64)
    grads = []
    for attn in (plain, biased):
        y = x.clone().requires_grad_()
        attn(y).square().sum().backward()
        grads.append((y.grad, attn.qkv.weight.grad))
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-11)


def test_neighbors_count_and_contain_the_token():
    for length, window, dilation in [(9, 3, 2), (7, 7, 1), (11, 3, 3), (8, 2, 1)]:
        seen = neighbors(length, window, dilation, torch.device("cpu"))
        assert seen.tolist() == [window_of(i, length, window, dilation) for i in range(length)]
        assert (seen == torch.arange(length)[:, None]).any(1).all()


def test_attention_is_local():
    attn = NeighborhoodAttention2d(8, 2, 3)
    x = torch.randn(1, 9, 9, 8)
    changed = x.clone()
    changed[:, 0, 0] += 1
    moved = (attn(x) != attn(changed)).any(-1)[0]
    # The first token is seen by the first two rows and columns; at the border, by no more.
    assert moved[:2, :2].all() and moved.sum() == 4


def test_dilation_sees_farther():
    attn = NeighborhoodAttention2d(8, 2, 3, dilation=3)
    x = torch.randn(1, 9, 9, 8)
    changed = x.clone()
    changed[:, 4, 4] += 1
    moved = (attn(x) != attn(changed)).any(-1)[0].nonzero().tolist()
    assert moved == [[r, s] for r in (1, 4, 7) for s in (1, 4, 7)]


@pytest.mark.parametrize("name", ["nat_mini", "dinat_tiny", "nat_small", "dinat_base"])
def test_published_parameters_and_multiply_accumulates(name):
    with torch.device("meta"):
        model = timm.create_model(name).eval()

    def window_flops(q, k, v, grid, window, *_, out_val=None, **__):
        return 4 * math.prod(q) * math.prod(window)

    op = torch.ops.mmattn.neighborhood_attention
    with FlopCounterMode(display=False, custom_mapping={op: window_flops}) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    params, macs = PUBLISHED[name.split("_")[1]]
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == params
    assert round(counter.get_total_flops() / 2e9, 1) == macs
    flops = counter.get_flop_counts()["Global"][op]
    assert flops > 0, "the windows must run in the op"


def test_dilations_of_the_paper():
    with torch.device("meta"):
        mini, tiny = timm.create_model("dinat_mini"), timm.create_model("dinat_tiny")
    of = [[b.attn.dilation for b in stage.blocks] for stage in tiny.stages]
    assert of == [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 9, [1] * 5]
    assert [b.attn.dilation for b in mini.stages[2].blocks] == [1, 2] * 3


@pytest.mark.parametrize("size", [(32, 32), (65, 97)])
def test_any_resolution(size):
    model = NAT(**SMALL).eval()
    assert model(torch.randn(2, 3, *size)).shape == (2, 5)


def test_batch_rows_are_independent():
    model = NAT(**SMALL).eval()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x)[1:], model(x[1:]), rtol=1e-5, atol=1e-6)


def test_timm_manners():
    model = timm.create_model("nat_mini", num_classes=7, in_chans=1, **_short(), drop_path_rate=0.1)
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 7)
    assert model.get_classifier().out_features == 7
    model.reset_classifier(3)
    assert model.eval()(torch.randn(1, 1, 64, 64)).shape == (1, 3)
    assert (
        model.forward_head(model.forward_features(torch.randn(1, 1, 64, 64)), True).shape[1] == 128
    )
    model.reset_classifier(0, "")
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 2, 2, 128)
    assert model.pretrained_cfg["first_conv"] + ".weight" in model.state_dict()
    groups = model.group_matcher()
    assert re.match(groups["stem"], "patch_embed.norm.weight")
    biased = NAT(**SMALL, rel_pos_bias=True)
    assert len(biased.no_weight_decay()) == 5 and not NAT(**SMALL).no_weight_decay()


def _short():
    return {k: v for k, v in SMALL.items() if k not in ("num_classes", "dilations")}


def test_features_only():
    model = timm.create_model("dinat_mini", features_only=True, out_indices=(1, 2), **_short())
    assert model.feature_info.channels() == [32, 64] and model.feature_info.reduction() == [8, 16]
    maps = model(torch.randn(1, 3, 64, 96))
    assert [m.shape for m in maps] == [(1, 32, 8, 12), (1, 64, 4, 6)]
    assert len(model.model.stages) == 3


def test_intermediates_end_in_the_features():
    model = NAT(**SMALL).eval()
    x = torch.randn(1, 3, 64, 64)
    final, maps = model.forward_intermediates(x, norm=True)
    assert torch.equal(final, model.forward_features(x))
    assert torch.equal(maps[-1].permute(0, 2, 3, 1), final)


def test_layers_are_grouped_from_stem_to_head():
    model = NAT(**SMALL)
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    order = [model.patch_embed, *(b for stage in model.stages for b in stage.blocks), model.head]
    scales = [scale[id(next(module.parameters()))] for module in order]
    assert scales == sorted(set(scales)) and scales[-1] == 1.0


def test_official_state_dict_loads():
    model = NAT(**SMALL, rel_pos_bias=True, layer_scale=0.5)
    official = {}
    for key, value in model.state_dict().items():
        key = re.sub(
            r"^stages\.(\d+)\.downsample", lambda m: f"levels.{int(m[1]) - 1}.downsample", key
        )
        key = re.sub(r"^stages\.", "levels.", key)
        key = re.sub(r"\.ls(\d)\.gamma", r".gamma\1", key).replace("head.fc.", "head.")
        official[key] = value
    assert {"levels.0.downsample.reduction.weight", "levels.1.blocks.1.gamma2"} <= set(official)
    other = NAT(**SMALL, rel_pos_bias=True, layer_scale=0.1)
    other.load_state_dict(nat.checkpoint_filter_fn(official, other))
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model.eval()(x), other.eval()(x))
    assert nat.checkpoint_filter_fn(model.state_dict(), other).keys() == model.state_dict().keys()
    with pytest.raises(ConfigError, match="rel_pos_bias=True"):
        nat.checkpoint_filter_fn(official, NAT(**SMALL, layer_scale=0.1))


def test_gradient_checkpointing_changes_nothing():
    model = NAT(**SMALL)
    x, grads = torch.randn(1, 3, 64, 64), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


def test_compiles_without_breaks():
    model = NAT(dim=16, depths=(1, 1), num_heads=(2, 2), kernel_size=3).eval()
    layer = NeighborhoodAttention2d(8, 2, 3, rel_pos_bias=True)
    for module, x in ((model, torch.randn(1, 3, 32, 32)), (layer, torch.randn(1, 5, 6, 8))):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-5)


def test_the_scale_of_the_scores_is_that_of_attention():
    attn = NeighborhoodAttention2d(8, 2, 5)
    x = torch.randn(1, 5, 5, 8)
    q, k, v = attn.qkv(x).view(1, 25, 3, 2, 4).permute(2, 0, 3, 1, 4)
    dense = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, 5, 5, 8)
    torch.testing.assert_close(attn(x), attn.proj(dense))


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="3 heads do not divide dim 8"):
        NeighborhoodAttention2d(8, 3)
    with pytest.raises(ConfigError, match="one of each"):
        NAT(**{**SMALL, "depths": (1, 1)})
