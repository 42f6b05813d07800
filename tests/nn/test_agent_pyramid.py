"""Agent-Swin, Agent-PVT and Agent-CSwin in timm: interface, sizes, checkpoints, stripes."""

import re

import pytest
import timm
import timm.optim
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock

from mmattn.nn import agent_cswin, agent_pvt, agent_swin
from mmattn.nn.agent import AgentAttention

FAMILIES = {
    "agent_swin_tiny": agent_swin,
    "agent_pvt_tiny": agent_pvt,
    "agent_cswin_tiny": agent_cswin,
}
SMALL = {"img_size": 64, "num_classes": 5, "depths": (2, 1, 2, 1), "agents": (4, 4, 4, 4)}
SMALL |= {"num_heads": (1, 2, 2, 2)}
WIDTH = {
    "agent_swin_tiny": {"embed_dim": 8, "agent_blocks": (2, 1, 1, 0), "window_size": 3},
    "agent_pvt_tiny": {"embed_dims": (8, 16, 24, 32)},
    "agent_cswin_tiny": {"embed_dim": 8, "stripe": 3},
}


def small(name, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, **(SMALL | WIDTH[name] | kwargs)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def official_tables(key, value):
    """One tensor of our agent layer under the official name and shape."""
    match = re.search(r"(key|query)_bias\.(block|row|col)$", key)
    if match:
        letter = {"block": "n", "row": "h", "col": "w"}[match[2]]
        if match[2] != "block":
            value = value[..., None] if match[2] == "row" else value[..., None, :]
            value = (value.movedim(1, -1) if match[1] == "query" else value)[None]
        name = f"a{letter}_bias" if match[1] == "key" else f"{letter}a_bias"
        key = key[: match.start()] + name
    return key, value


def official_swin(key, value):
    key = re.sub(
        r"^stages\.([1-9])\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key
    )
    key = key.replace("stages.0.downsample", "patch_embed").replace("value_conv", "dwc")
    yield re.sub(r"^stages", "layers", key), value


def official_pvt(key, value):
    if match := re.match(r"stages\.(\d)\.(downsample|blocks)\.", key):
        stage, rest = int(match[1]) + 1, key[match.end() :]
        if rest == "pos_embed":
            yield f"pos_embed{stage}", value.flatten(1, 2)
            return
        key = f"{'block' if match[2] == 'blocks' else 'patch_embed'}{stage}.{rest}"
    key = key.replace("value_conv", "dwc")
    if ".qkv." in key:
        c = value.shape[0] // 3
        yield key.replace("qkv", "q"), value[:c]
        yield key.replace("qkv", "kv"), value[c:]
    else:
        yield key, value


def official_cswin(key, value):
    key = re.sub(r"^stages\.([1-9])\.downsample\.proj", r"merge\1.conv", key)
    key = re.sub(r"^stages\.([1-9])\.downsample\.norm", r"merge\1.norm", key)
    key = key.replace("stages.0.downsample.proj", "stage1_conv_embed.0")
    key = key.replace("stages.0.downsample.norm", "stage1_conv_embed.2")
    key = re.sub(r"^stages\.(\d)\.blocks", lambda m: f"stage{int(m[1]) + 1}", key)
    key = re.sub(r"attn\.(qkv|proj)\.", r"\1.", key)
    key = re.sub(r"attn\.value_conv\.(\d)\.", r"attns.\1.get_v.", key)
    key = key.replace("attn.value_conv", "attns.0.get_v").replace(".attn.", ".attns.0.")
    yield key, value


RENAME = {
    "agent_swin_tiny": official_swin,
    "agent_pvt_tiny": official_pvt,
    "agent_cswin_tiny": official_cswin,
}


def official(name, model):
    state = {}
    for key, value in model.state_dict().items():
        for k, v in RENAME[name](*official_tables(key, value)):
            state[k.replace("head.fc", "head")] = v
    return state


SAMPLE_NAMES = {
    "agent_swin_tiny": ["layers.0.downsample.reduction.weight", "layers.0.blocks.0.attn.ah_bias"],
    "agent_pvt_tiny": ["pos_embed3", "block2.0.attn.kv.weight", "patch_embed1.norm.weight"],
    "agent_cswin_tiny": [
        "stage1.0.attns.0.get_v.weight",
        "stage3.1.attns.1.get_v.bias",
        "merge3.conv.bias",
    ],
}


@pytest.mark.parametrize("name", FAMILIES)
def test_official_checkpoints_load_by_name(name):
    model = small(name)
    renamed = official(name, model)
    assert renamed.keys() >= set(SAMPLE_NAMES[name])
    assert not any("bias." in key or key.startswith("stages") for key in renamed)
    if name == "agent_swin_tiny":
        renamed["layers.2.blocks.1.attn.relative_position_index"] = torch.zeros(9, 9)
    container = "state_dict_ema" if name == "agent_cswin_tiny" else "model"
    back = FAMILIES[name].checkpoint_filter_fn({container: renamed}, model)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoint_fits_another_image_size(name):
    model = small(name)
    large = small(
        name, img_size=(96, 128), **({"window_size": 5} if name == "agent_swin_tiny" else {})
    )
    fitted = FAMILIES[name].checkpoint_filter_fn(official(name, model), large)
    large.load_state_dict(fitted)
    assert fitted["stages.0.blocks.0.attn.key_bias.col"].shape[-1] == 32
    image = torch.randn(1, 3, 96, 128)
    if name == "agent_pvt_tiny":
        # Tables that were stretched when loading equal tables stretched in the forward.
        torch.testing.assert_close(large(image), model(image), rtol=1e-4, atol=1e-4)
    assert large(image).shape == (1, 5)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", [(64, 64), (96, 64), (128, 72)])
def test_any_resolution_and_independent_rows(name, size):
    model = small(name)
    image = torch.randn(2, 3, *size)
    out = model(image)
    assert out.shape == (2, 5) and out.isfinite().all()
    torch.testing.assert_close(model(image[1:]), out[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_timm_interface(name):
    model = small(name)
    image = torch.randn(1, 3, 64, 64)
    width = model.num_features
    features = model.forward_features(image)
    assert features.shape == (1, 2, 2, width)
    assert model.forward_head(features, pre_logits=True).shape == (1, width)
    final, maps = model.forward_intermediates(image, norm=True)
    torch.testing.assert_close(final, features)
    torch.testing.assert_close(maps[-1].permute(0, 2, 3, 1), features)
    backbone = small(name, features_only=True)
    assert [tuple(m.shape[2:]) for m in backbone(image)] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    assert backbone.feature_info.reduction() == [4, 8, 16, 32]
    model.reset_classifier(7, "max")
    assert model(image).shape == (1, 7)
    model.reset_classifier(0, "")
    assert model(image).shape == (1, 2, 2, width)
    assert model.prune_intermediate_layers([1]) == [1]
    assert model(image).shape == (1, 8, 8, model.num_features)
    spared = {"agent_swin_tiny": 2, "agent_pvt_tiny": 4, "agent_cswin_tiny": 0}[name]
    assert len(small(name).no_weight_decay()) == spared
    groups = timm.optim.param_groups_layer_decay(small(name), layer_decay=0.5)
    assert sum(len(g["params"]) for g in groups) == len(list(small(name).parameters()))
    assert len({g["lr_scale"] for g in groups}) > 4


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient(name):
    image = torch.randn(2, 3, 64, 64)
    grads = []
    for enable in (False, True):
        model = small(name)
        model.set_grad_checkpointing(enable)
        model(image).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, again in zip(*grads, strict=True):
        assert plain is not None
        torch.testing.assert_close(plain, again)


# An agent block, and where there are others, one block of each kind.
SHALLOW = {
    "agent_swin_tiny": {"depths": (1, 2), "agent_blocks": (1, 0)},
    "agent_pvt_tiny": {"depths": (1, 1), "embed_dims": (8, 16)},
    "agent_cswin_tiny": {"depths": (1, 1, 1), "agent_stages": 1},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_it_compiles_in_one_graph(name):
    torch._dynamo.reset()
    model = small(name, **SHALLOW[name])
    image = torch.randn(1, 3, 64, 64)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(image), model(image))


def test_which_blocks_use_agents():
    def kinds(name, **kwargs):
        model = timm.create_model(name, device="meta", **kwargs)
        return ["".join("A" if isinstance(b.attn, AgentAttention) else "s" for b in st.blocks)
                for st in model.stages]  # fmt: skip

    assert kinds("agent_swin_tiny") == ["AA", "AA", "AAAAAA", "ss"]
    assert kinds("agent_swin_base") == ["AA", "AA", "AA" + "s" * 16, "ss"]
    assert kinds("agent_cswin_tiny") == ["AA", "AAAA", "s" * 18, "s"]


@pytest.mark.parametrize(("size", "window"), [(224, 7), (288, 9), (384, 12)])
def test_windows_and_stripes_grow_with_the_image(size, window):
    swin = timm.create_model("agent_swin_base", img_size=size, device="meta", depths=(1, 1, 4, 1))
    blocks = [b for b in swin.stages[2].blocks if isinstance(b, SwinTransformerBlock)]
    assert [b.window_size for b in blocks] == [(window, window)] * 2
    assert [b.shift_size[0] for b in blocks] == [0, window // 2]
    cswin = timm.create_model("agent_cswin_tiny", img_size=size, device="meta", depths=(1,) * 4)
    assert cswin.stages[2].blocks[0].attn.stripe == window
    assert cswin.stages[3].blocks[0].attn.stripe is None


@pytest.mark.parametrize("grid", [(6, 6), (5, 7), (2, 9)])
def test_stripes_equal_masked_attention(grid):
    torch.manual_seed(0)
    layer = agent_cswin.StripeAttention(8, 4, 3).double()
    x = torch.randn(2, grid[0] * grid[1], 8, dtype=torch.float64)
    q, k, v = layer.qkv(x).chunk(3, -1)
    y = torch.arange(grid[0]).repeat_interleave(grid[1])
    c = torch.arange(grid[1]).repeat(grid[0])
    parts = []
    for branch, place in enumerate((c, y)):
        part = slice(branch * 4, branch * 4 + 4)
        heads = [t[..., part].unflatten(2, (2, 2)).transpose(1, 2) for t in (q, k, v)]
        same = (place[:, None] // 3) == (place // 3)
        out = F.scaled_dot_product_attention(*heads, attn_mask=same).transpose(1, 2).flatten(2)
        conv = layer.value_conv[branch]
        for s in range(int(place.max()) // 3 + 1):
            # The convolution of a stripe sees zeros where the next stripe begins.
            inside = (place // 3 == s).view(1, 1, *grid)
            image = v[..., part].transpose(1, 2).unflatten(2, grid) * inside
            out = out + (conv(image) * inside).flatten(2).transpose(1, 2)
        parts.append(out)
    assert not same.all() or grid[0] <= 3
    torch.testing.assert_close(layer(x, grid), layer.proj(torch.cat(parts, -1)))
