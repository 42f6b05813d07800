"""NaLaFormer: scores written out, invariants of the method, sizes, timm's manners."""

import math

import pytest
import timm
import torch

from mmattn.errors import ConfigError
from mmattn.nn.mala import checkpoint_filter_fn, grid_rope
from mmattn.nn.nala import NaLa, NaLaFormer, NaLaSoftmax, key_features, query_features

SMALL = {
    "dims": (8, 16, 16, 32),
    "depths": (1, 2, 1, 1),
    "num_heads": (1, 2, 2, 4),
    "head_dim": 24,
    "num_classes": 5,
}
# Millions of parameters with the published settings; the paper rounds them, and prints 8 for the first.
PARAMETERS = {"xtiny": 6.14, "tiny": 15.91, "small": 25.65, "base": 52.00, "large": 95.43}


def loop(layer: NaLa, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """One image, one query at a time, from the equations."""
    y, w, c = x.shape
    n, d = y * w, c // layer.num_heads
    q, k, v, gate = layer.qkvg(x).view(n, 4, c).unbind(1)
    local = layer.lepe(v.T.reshape(1, c, y, w)).view(c, n).T
    turn = torch.complex(*rope)
    out = torch.zeros(n, c, dtype=x.dtype)

    def turned(f, i):
        return torch.view_as_complex(f.contiguous().view(-1, 2)) * turn[i]

    for h in range(layer.num_heads):
        part = slice(h * d, (h + 1) * d)
        for i in range(n):
            length = q[i, part].square().sum().sqrt()
            power = 3 * (0.5 + torch.tanh(length))
            scores, mass = [], 0.0
            for j in range(n):
                score = 0.0
                for sign in (1, -1):
                    fq = (sign * q[i, part] / length).clamp(min=0) ** power
                    fk = (sign * k[j, part] ** 3).clamp(min=0)
                    mass = mass + fq @ fk / n
                    score = score + (turned(fq, i) * turned(fk, j).conj()).real.sum()
                scores.append(score / n)
            out[i, part] = torch.stack(scores) @ v[:, part] / (mass + 1e-6)
    mixed = torch.nn.functional.layer_norm(
        out + local, (c,), layer.norm.weight, layer.norm.bias, layer.norm.eps
    )
    return layer.out_proj(mixed * gate * gate.sigmoid()).view(y, w, c)


def test_layer_equals_the_scores_written_out():
    layer = NaLa(16, 2).double()
    torch.nn.init.normal_(layer.qkvg.weight, std=0.5)
    x = torch.randn(2, 2, 3, 16, dtype=torch.float64)
    rope = grid_rope((2, 3), 8, x)
    for got, image in zip(layer(x, rope), x, strict=True):
        torch.testing.assert_close(got, loop(layer, image, rope), rtol=1e-8, atol=1e-8)


def test_features_are_positive_and_their_power_follows_the_length():
    q = torch.randn(5, 8, dtype=torch.float64)
    for length, power in ((1e-9, 1.5), (50.0, 4.5)):
        q = q / q.norm(dim=-1, keepdim=True) * length
        features = query_features(q)
        assert (features >= 0).all() and features.shape == (5, 16)
        positive = q[0] > 0
        expected = (q[0][positive] / length) ** power
        torch.testing.assert_close(features[0, :8][positive], expected, rtol=1e-6, atol=0)
    assert torch.equal(key_features(q)[:, :8] - key_features(q)[:, 8:], q.pow(3))


def heads(n: int = 9) -> tuple[torch.Tensor, ...]:
    return torch.randn(3, 1, 2, n, 8, dtype=torch.float64).unbind(0)


def test_longer_queries_look_more_sharply():
    """The entropy of weights falls with the length; plain linear attention would not notice it."""
    q, k, _ = heads(32)
    identity = torch.eye(32, dtype=torch.float64).expand(1, 2, 32, 32)
    entropy = []
    for length in (0.1, 0.5, 3.0):
        scaled = q / q.norm(dim=-1, keepdim=True) * length
        weights = NaLa(16, 2).double().attend(scaled, k, identity, None)
        torch.testing.assert_close(
            weights.sum(-1), torch.ones(1, 2, 32).double(), atol=1e-2, rtol=0
        )
        entropy.append(-(weights.clamp(min=1e-30).log() * weights).sum(-1).mean().item())
    assert entropy[0] > entropy[1] + 0.02 and entropy[1] > entropy[2] + 0.1


def test_scale_of_keys_and_common_sign_do_not_matter():
    layer = NaLa(16, 2).double()
    q, k, v = heads()
    out = layer.attend(q, k, v, None)
    torch.testing.assert_close(layer.attend(q, 5 * k, v, None), out, rtol=1e-3, atol=1e-3)
    rope = grid_rope((3, 3), 8, q)
    torch.testing.assert_close(
        layer.attend(-q, -k, v, rope), layer.attend(q, k, v, rope), rtol=1e-9, atol=1e-9
    )
    assert not torch.allclose(layer.attend(-q, k, v, None), out, atol=0.1)


def test_zero_queries_read_nothing_and_have_gradients():
    q, k, v = heads()
    q[:, :, 0] = 0
    q.requires_grad_()
    out = NaLa(16, 2).attend(q, k, v, None)
    assert (out[:, :, 0] == 0).all() and out.isfinite().all()
    out.sum().backward()
    assert q.grad.isfinite().all()


@pytest.mark.parametrize("size", list(PARAMETERS))
def test_published_parameters(size):
    with torch.device("meta"):
        model = timm.create_model(f"nalaformer_{size}")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == PARAMETERS[size]


def test_two_stages_are_linear():
    kinds = [type(stage.blocks[0].attn) for stage in NaLaFormer(**SMALL).stages]
    assert kinds == [NaLa, NaLa, NaLaSoftmax, NaLaSoftmax]


def test_softmax_layer_is_attention_with_turned_queries():
    layer = NaLaSoftmax(16, 2).double()
    q, k, v = heads()
    rope = grid_rope((3, 3), 8, q)
    turn = torch.complex(*rope)
    tq, tk = (torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2))) * turn for x in (q, k))
    scores = torch.einsum("bhid,bhjd->bhij", tq, tk.conj()).real / math.sqrt(8)
    torch.testing.assert_close(layer.attend(q, k, v, rope), scores.softmax(-1) @ v)


@pytest.mark.parametrize("size", [(32, 32), (65, 97)])
def test_any_resolution_and_independent_rows(size):
    model = NaLaFormer(**SMALL).eval()
    x = torch.randn(2, 3, *size)
    out = model(x)
    assert out.shape == (2, 5)
    torch.testing.assert_close(out[1:], model(x[1:]), rtol=1e-4, atol=1e-5)


def test_timm_manners():
    settings = {k: v for k, v in SMALL.items() if k != "num_classes"}
    model = timm.create_model("nalaformer_tiny", num_classes=7, in_chans=1, **settings).eval()
    x = torch.randn(1, 1, 64, 64)
    assert model(x).shape == (1, 7)
    model.reset_classifier(3)
    assert model(x).shape == (1, 3) and model.get_classifier().out_features == 3
    features = timm.create_model(
        "nalaformer_tiny", features_only=True, out_indices=(1, 3), **settings
    )
    assert features.feature_info.reduction() == [8, 32]
    maps = features(torch.randn(1, 3, 64, 96))
    assert [m.shape for m in maps] == [(1, 16, 8, 12), (1, 32, 2, 3)]


def test_state_dict_with_published_names_loads():
    model = NaLaFormer(**SMALL)
    official = {}
    for key, value in model.state_dict().items():
        stage = key.split(".")[1]
        if "downsample" in key:
            key = key.replace(f"stages.{stage}.", f"layers.{int(stage) - 1}.")
        key = key.replace("stages.", "layers.").replace("head.fc.", "head.")
        official[key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")] = value
    assert {"layers.0.blocks.0.attn.qkvg.weight", "layers.3.blocks.0.gamma_2"} <= set(official)
    other = NaLaFormer(**SMALL)
    other.load_state_dict(checkpoint_filter_fn(official, other))
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model.eval()(x), other.eval()(x))


def test_gradient_checkpointing_changes_nothing():
    model = NaLaFormer(**SMALL)
    x, grads = torch.randn(2, 3, 64, 64), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


def test_compiles_without_breaks():
    two = {k: v[1:3] for k, v in SMALL.items() if isinstance(v, tuple)}
    model = NaLaFormer(**two, linear=(True, False), layer_scale=(1.0, 1.0), head_dim=8).eval()
    x = torch.randn(1, 3, 32, 48)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_half_precision_stays_near_where_cubes_overflow():
    q, k, v = (x.float() for x in heads())
    k = 60 * k
    out = NaLa(16, 2).attend(q.half(), k.half(), v.half(), None)
    whole = NaLa(16, 2).attend(q.half().float(), k.half().float(), v.half().float(), None)
    assert (k.abs().max() ** 3) > 65504
    assert out.dtype == torch.float16 and (out - whole).norm() < 1e-2 * whole.norm()


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="3 heads do not divide dim 16"):
        NaLa(16, 3)
