"""PanelAttention over the rows of a batch: the invariants of group diffusion."""

from __future__ import annotations

import diffusers
import diffusers_zoo as zoo
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

import mmattn
from mmattn.methods.panel_attention import PanelAttention

GRID, TEXT = (1, 2, 3), 4


def inputs(family, batch=3, same_pooled=False):
    kwargs = zoo.inputs(family, batch, GRID)
    kwargs["encoder_hidden_states"] = zoo.rand(batch, TEXT, 16)
    if "txt_ids" in kwargs:
        kwargs["txt_ids"] = torch.zeros(TEXT, kwargs["txt_ids"].shape[1])
    if family == "pixart":
        kwargs["encoder_attention_mask"] = torch.ones(batch, TEXT)
    if same_pooled:
        kwargs["pooled_projections"] = zoo.rand(1, 8).repeat(batch, 1)
    return kwargs


def run(family, kwargs, method):
    model = zoo.shared(family)
    with mmattn.attach(model, method):
        return zoo.call(model, kwargs)


def with_row(kwargs, name, row):
    changed = kwargs[name].clone()
    changed[row] += 1.0
    return {**kwargs, name: changed}


def rows_changed(one, two):
    return {int(i) for i in (one != two).flatten(1).any(1).nonzero()}


@pytest.mark.parametrize("groups", [1, 2])
def test_equals_one_joint_sequence_on_flux(groups):
    """All texts, then all images, in one row, with the mask written from the rule, as stock FLUX runs it."""
    n = 3
    kwargs = inputs("flux", n * groups, same_pooled=True)
    owner = torch.cat([torch.arange(n).repeat_interleave(size) for size in (TEXT, 6)])
    image = torch.arange(len(owner)) >= n * TEXT
    seen = (owner[:, None] == owner) | (image[:, None] & image)
    joint = {
        **kwargs,
        "hidden_states": kwargs["hidden_states"].unflatten(0, (groups, n)).flatten(1, 2),
        "encoder_hidden_states": kwargs["encoder_hidden_states"]
        .unflatten(0, (groups, n))
        .flatten(1, 2),
        "pooled_projections": kwargs["pooled_projections"][:groups],
        "timestep": kwargs["timestep"][:groups],
        "img_ids": kwargs["img_ids"].repeat(n, 1),
        "txt_ids": kwargs["txt_ids"].repeat(n, 1),
        "joint_attention_kwargs": {"attention_mask": seen[None, None]},
    }
    want = zoo.call(zoo.shared("flux"), joint).unflatten(1, (n, -1)).flatten(0, 1)
    got = run("flux", kwargs, PanelAttention(members=n, visibility="group"))
    assert (got - want).abs().max() < 2e-6
    assert (got - zoo.call(zoo.shared("flux"), kwargs)).abs().max() > 1e-3


class Grouped(AttnProcessor2_0):
    """Self-attention over the tokens of a whole group, as the paper has it for cross-attention models."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        folded = hidden_states.unflatten(0, (-1, 3)).flatten(1, 2)
        return super().__call__(attn, folded, *args, **kwargs).unflatten(1, (3, -1)).flatten(0, 1)


def test_equals_concatenated_self_attention_on_pixart():
    kwargs = inputs("pixart", 6)
    model = zoo.model("pixart")
    for name, module in model.named_modules():
        if name.endswith("attn1"):
            module.set_processor(Grouped())
    want = zoo.call(model, kwargs)
    got = run("pixart", kwargs, PanelAttention(members=3, visibility="group"))
    assert (got - want).abs().max() < 2e-6
    assert (got - zoo.call(zoo.shared("pixart"), kwargs)).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["flux", "flux2", "sd3", "pixart"])
def test_who_depends_on_whom(family):
    group, apart = (PanelAttention(members=3, visibility=v) for v in ("group", "isolated"))
    kwargs = inputs(family, 6)  # two groups
    moved = with_row(kwargs, "hidden_states", 1)
    assert rows_changed(run(family, kwargs, group), run(family, moved, group)) == {0, 1, 2}
    assert rows_changed(run(family, kwargs, apart), run(family, moved, apart)) == {1}
    assert torch.equal(run(family, kwargs, apart), zoo.call(zoo.shared(family), kwargs))
    given = PanelAttention(members=3, visibility="reference-blocked", references=1)
    last = with_row(kwargs, "hidden_states", 2)
    assert rows_changed(run(family, kwargs, given), run(family, last, given)) == {1, 2}


@pytest.mark.parametrize("family", ["flux", "sd3", "pixart"])
def test_a_member_that_sees_nobody_is_drawn_as_if_alone(family):
    kwargs = inputs(family)
    method = PanelAttention(members=3, visibility=((1, 0, 0), (1, 1, 1), (1, 1, 1)))
    got, want = run(family, kwargs, method), zoo.call(zoo.shared(family), kwargs)
    assert (got[0] - want[0]).abs().max() < 2e-6
    assert (got[1:] - want[1:]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["flux", "sd3", "pixart"])
def test_permuting_members_permutes_pictures(family):
    kwargs, order = inputs(family), torch.tensor([2, 0, 1])
    per_row = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    turned = {k: v[order] if k in per_row else v for k, v in kwargs.items()}
    group = PanelAttention(members=3, visibility="group")
    assert (run(family, turned, group) - run(family, kwargs, group)[order]).abs().max() < 2e-6


@pytest.mark.parametrize("layers", [1, 2])
def test_a_caption_reaches_other_pictures_through_its_own_picture_only(layers):
    """One layer: the text of member 1 has not touched the image that others see. Two: it has."""
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=layers,
        num_single_layers=0,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    ).eval()
    kwargs = inputs("flux")
    with mmattn.attach(model, PanelAttention(members=3, visibility="group")):
        one = zoo.call(model, kwargs)
        two = zoo.call(model, with_row(kwargs, "encoder_hidden_states", 1))
    assert rows_changed(one, two) == ({1} if layers == 1 else {0, 1, 2})


def test_padding_of_a_row_is_its_own():
    """A masked word of one member is invisible, and words of the others are not."""
    model, kwargs = zoo.shared("qwenimage"), zoo.inputs("qwenimage", 2, GRID)
    mask = torch.ones(2, zoo.TEXT, dtype=torch.bool)
    mask[1, -1] = False
    kwargs["encoder_hidden_states_mask"] = mask

    def word(row):
        text = kwargs["encoder_hidden_states"].clone()
        text[row, -1] += 1.0
        return {**kwargs, "encoder_hidden_states": text}

    with mmattn.attach(model, PanelAttention(members=2, visibility="group")) as session:
        plain, hidden, shown = (zoo.call(model, k) for k in (kwargs, word(1), word(0)))
    assert session.stats.dense_calls == 0
    assert torch.equal(plain, hidden) and rows_changed(plain, shown) == {0, 1}
