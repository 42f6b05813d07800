"""Agent-DeiT in timm: interface, sizes, checkpoints."""

import pytest
import timm
import torch

import mmattn.nn.agent_deit as agent_deit
from mmattn.nn.agent import AgentAttention


def tiny(**kwargs):
    torch.manual_seed(0)
    args = {
        "img_size": 64,
        "depth": 2,
        "num_classes": 5,
        "embed_dim": 24,
        "num_heads": 3,
        "agents": 9,
    }
    return timm.create_model("agent_deit_tiny", **(args | kwargs)).eval()


def official(model):
    """The state dict under the names and shapes of the authors' checkpoints."""
    state = {}
    for key, value in model.state_dict().items():
        head, _, last = key.rpartition(".")
        if "_bias" in head:
            side, table = head.rsplit(".", 1)[1], last
            letter = {"block": "n", "row": "h", "col": "w", "prefix": "c"}[table]
            query = side == "query_bias"
            if table != "block":
                value = {"row": value[..., None], "col": value[..., None, :], "prefix": value}[
                    table
                ]
                value = value.movedim(1, -1) if query else value
                value = value[None]
            key = key.removesuffix(f"{side}.{last}") + (
                f"{letter}a_bias" if query else f"a{letter}_bias"
            )
        state[key.replace("value_conv", "dwc")] = value
    return state


def test_official_checkpoints_load_by_name():
    model = tiny()
    renamed = official(model)
    assert renamed["blocks.0.attn.ah_bias"].shape == (1, 3, 9, 4, 1)
    assert renamed["blocks.0.attn.wa_bias"].shape == (1, 3, 1, 4, 9)
    assert renamed["blocks.0.attn.ca_bias"].shape == (1, 3, 1, 9)
    back = agent_deit.checkpoint_filter_fn({"model": renamed}, model)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[k], v) for k, v in model.state_dict().items())


def test_a_checkpoint_fits_another_image_size():
    small, large = tiny(), tiny(img_size=96)
    large.load_state_dict(agent_deit.checkpoint_filter_fn(official(small), large))
    resized = tiny()
    resized.set_input_size((96, 96))
    image = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(large(image), resized(image))


def test_sizes_other_than_the_built_one():
    model = tiny(dynamic_img_size=True)
    assert model(torch.randn(1, 3, 48, 48)).shape == (1, 5)
    with pytest.raises(ValueError, match="set_input_size"):
        model(torch.randn(1, 3, 48, 80))
    model.set_input_size((48, 80))
    assert model(torch.randn(1, 3, 48, 80)).shape == (1, 5)


def test_only_the_first_blocks_use_agents_in_the_base_model():
    model = timm.create_model("agent_deit_base", device="meta")
    kinds = [isinstance(b.attn, AgentAttention) for b in model.blocks]
    assert kinds == [True] * 4 + [False] * 8
    assert model.blocks[0].attn.side == 9


def test_timm_interface():
    model = tiny()
    image = torch.randn(2, 3, 64, 64)
    out = model(image)
    torch.testing.assert_close(model(image[1:]), out[1:])
    features = model.forward_features(image)
    assert features.shape == (2, 17, 24)
    assert model.forward_head(features, pre_logits=True).shape == (2, 24)
    model.reset_classifier(7)
    assert model.get_classifier().out_features == 7
    maps = tiny(features_only=True, out_indices=(0, 1))(image)
    assert [m.shape for m in maps] == [(2, 24, 4, 4)] * 2
    assert model.pretrained_cfg["input_size"] == (3, 224, 224)
    with pytest.raises(ValueError, match="patch_drop_rate"):
        tiny(patch_drop_rate=0.5)


def test_gradient_checkpointing_changes_no_gradient():
    image = torch.randn(2, 3, 64, 64)
    grads = []
    for enable in (False, True):
        model = tiny()
        model.set_grad_checkpointing(enable)
        model(image).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(plain, again)


def test_it_compiles_in_one_graph():
    model = tiny(depth=1)
    image = torch.randn(1, 3, 64, 64)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(image), model(image))
