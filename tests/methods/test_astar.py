"""A-STAR: losses in closed form and in loops, maps against a full softmax, gradients against differences."""

import sys
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mmattn
from mmattn.clock import StepClock
from mmattn.layout import Layout
from mmattn.methods._word_maps import Watch, memories, word_places
from mmattn.methods.astar import AStar, regions, retention, segregation
from mmattn.mini.text import clip_tokenizer, t5_tokenizer
from mmattn.runs import Root, Run
from mmattn.sites import Site

sys.path.insert(0, str(Path(__file__).parents[1] / "hosts"))
import diffusers_zoo as zoo


def loop_segregation(maps):
    total = []
    for row in maps.tolist():
        flat = [torch.tensor(m).flatten().tolist() for m in row]
        total.append(
            sum(
                sum(min(a, b) for a, b in zip(m, n, strict=True)) / (sum(m) + sum(n))
                for m, n in combinations(flat, 2)
            )
        )
    return torch.tensor(total)


def loop_retention(maps, target):
    total = []
    for row, regions_of_row in zip(maps.tolist(), target.float().tolist(), strict=True):
        cost = 0.0
        for m, r in zip(row, regions_of_row, strict=True):
            a, b = torch.tensor(m).flatten().tolist(), torch.tensor(r).flatten().tolist()
            cost += 1 - sum(min(x, y) for x, y in zip(a, b, strict=True)) / (sum(a) + sum(b))
        total.append(cost)
    return torch.tensor(total)


def test_losses_equal_the_formulas_in_loops():
    maps = zoo.rand(2, 3, 1, 4, 5).abs()
    target = zoo.rand(2, 3, 1, 4, 5, seed=1) > 0
    torch.testing.assert_close(segregation(maps), loop_segregation(maps))
    torch.testing.assert_close(retention(maps, target), loop_retention(maps, target))
    torch.testing.assert_close(segregation(maps), segregation(maps.flip(1)))
    apart, kept = AStar().loss(maps, None)
    assert torch.equal(apart, segregation(maps)) and kept.tolist() == [0, 0]


def test_losses_at_their_ends():
    left = torch.zeros(1, 1, 1, 2, 4)
    left[..., :2] = 1
    assert segregation(torch.cat([left, left.flip(-1)], 1)).item() == 0
    assert segregation(left.expand(1, 4, 1, 2, 4)).item() == pytest.approx(6 * 0.5)
    assert segregation(left).item() == 0, "a single concept overlaps with nothing"
    assert retention(left, left.bool()).item() == pytest.approx(0.5)
    nothing = torch.zeros_like(left)
    assert retention(nothing, left.bool()).item() == 1
    assert torch.isfinite(segregation(nothing.expand(1, 2, 1, 2, 4))).all()
    assert torch.isfinite(retention(nothing, nothing.bool())).all()


def test_regions_are_relative_to_each_map():
    ramp = torch.arange(10.0).view(1, 1, 1, 2, 5)
    both = torch.cat([ramp, ramp * 0.01 + 3], 1)
    for tau in (0.0, 0.5, 0.8):
        assert regions(both, tau)[0, :, 0].flatten(1).sum(1).tolist() == [9 - int(9 * tau)] * 2
    assert not regions(torch.ones_like(ramp), 0.5).any()


# -- maps -------------------------------------------------------------------------------------------


def probabilities(q, k, mask=None):
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1)


def recorded(kind, layout, q, k, *, over, places, rows, mask=None):
    run = Run(Root("", torch.nn.Identity()), (AStar(),), StepClock(), "error", 0)
    run.layout = layout
    site = Site(path="attn", kind=kind, module=torch.nn.Identity(), run=run)
    watch = Watch(places, rows, over)
    watch.record(q, k, mask, None, site)
    return watch.maps(16, pyramid=layout.pyramid)


def test_cross_maps_are_the_softmax_of_the_rows_asked_for():
    q, k = zoo.rand(4, 2, 24, 8), zoo.rand(4, 2, 5, 8)
    mask = torch.ones(4, 1, 1, 5, dtype=torch.bool)
    mask[3, ..., 4] = False
    places = [((1,), (2, 3)), ((4,), (0,))]
    got = recorded(
        "cross",
        Layout(grid=(1, 4, 6)),
        q,
        k,
        over="text",
        places=places,
        rows=slice(2, 4),
        mask=mask,
    )
    full = probabilities(q, k, mask).mean(1)
    assert got.shape == (2, 2, 1, 4, 6)
    torch.testing.assert_close(got[0, 0].flatten(), full[2, :, 1])
    torch.testing.assert_close(got[0, 1].flatten(), (full[2, :, 2] + full[2, :, 3]) / 2)
    torch.testing.assert_close(got[1, 1].flatten(), full[3, :, 0])
    assert (got[1, 0] == 0).all(), "a masked word gets no attention"


@pytest.mark.parametrize("text", ["before", "after"])
def test_joint_maps_over_the_text_or_over_all_keys(text):
    q, k = zoo.rand(1, 2, 29, 8), zoo.rand(1, 2, 29, 8, seed=1)
    layout = Layout(grid=(1, 4, 6), text=text)
    image = layout.image_slice(29)
    first = 0 if text == "before" else 24
    asked = {"places": [((0,), (3,))], "rows": slice(0, 1)}
    got = recorded("joint", layout, q, k, over="keys", **asked)
    full = probabilities(q, k).mean(1)[0, image]
    torch.testing.assert_close(got.flatten(2)[0], full[:, [first, first + 3]].T)
    got = recorded("joint", layout, q, k, over="text", **asked)
    among = probabilities(q[:, :, image], k[:, :, first : first + 5]).mean(1)[0]
    torch.testing.assert_close(got.flatten(2)[0], among[:, [0, 3]].T)


def test_grids_of_a_pyramid_are_chosen_and_large_ones_are_averaged_down():
    watch = Watch([((0,),)], slice(0, 1), "text")
    sizes = [(1, 8, 12), (1, 4, 6), (1, 4, 6), (1, 2, 3)]
    found = [(s, torch.full((1, 1, s[1] * s[2]), float(i))) for i, s in enumerate(sizes)]
    watch.found = list(found)
    assert torch.equal(watch.maps(6, pyramid=True), torch.full((1, 1, 1, 4, 6), 1.5))
    watch.found = list(found)
    with pytest.raises(mmattn.UnsupportedCall, match=r"at most resolution=2.*\[3, 6, 12\]"):
        watch.maps(2, pyramid=True)
    ramp = torch.arange(96.0).view(8, 12)
    watch.found = [((1, 8, 12), ramp.reshape(1, 1, 96))]
    small = watch.maps(6, pyramid=False)
    assert small.shape == (1, 1, 1, 4, 6)
    assert small[0, 0, 0, 1, 2] == ramp[2:4, 4:6].mean()


def test_transformers_are_watched_between_depth_and_unets_everywhere():
    for name, expected in (("flux", [1]), ("unet", list(range(7)))):
        with mmattn.attach(zoo.shared(name), AStar(depth=(0.4, 0.6))) as session:
            assert [s.index for s in session.runs[0].sites if s.roles[0]] == expected
    with mmattn.attach(zoo.shared("flux"), AStar(depth=(0.9, 0.95))) as session:
        assert [s.index for s in session.runs[0].sites if s.roles[0]] == [2], "never none at all"


# -- gradients ----------------------------------------------------------------------------------------

INPUT = {
    "unet": "sample",
    "flux": "hidden_states",
    "sd3": "hidden_states",
    "pixart": "hidden_states",
}
METHOD = AStar(depth=(0.0, 1.0), resolution=12)
WORDS = [((1,), (3,))]


def loss_of(name, model, x, target=None):
    """The summed losses of a model at its input `x` through the seam, the maps, and the gradient."""
    with mmattn.attach(model, METHOD) as session:
        session.step(0, 2)
        watch = Watch(WORDS, slice(0, 1), "text")
        hook = model.register_forward_pre_hook(
            lambda *_: [memory.update(watch=watch) for memory in memories(session, AStar)] and None
        )
        model(**{**zoo.inputs(name), INPUT[name]: x})
        maps = watch.maps(METHOD.resolution, pyramid=name == "unet")
        loss = sum(part.sum() for part in METHOD.loss(maps, target))
        gradient = torch.autograd.grad(loss, x)[0] if x.requires_grad else None
        hook.remove()
        return loss.detach(), maps.detach(), gradient


@pytest.mark.parametrize("name", INPUT)
def test_gradients_equal_finite_differences_and_a_small_step_lowers_the_loss(name):
    model = zoo.model(name)
    x = zoo.inputs(name)[INPUT[name]].clone().requires_grad_()
    _, maps, _ = loss_of(name, model, x.detach())
    target = regions(maps.flip(-1), 0.5)
    loss, _, gradient = loss_of(name, model, x, target)
    assert gradient.abs().max() > 0
    way = gradient / gradient.norm()
    with torch.no_grad():
        up, down = (loss_of(name, model, x + s * 0.02 * way, target)[0] for s in (1, -1))
    assert ((up - down) / 0.04).item() == pytest.approx(gradient.norm().item(), rel=0.05)
    assert down < loss < up


def test_checkpointed_models_give_the_same_gradient():
    model = zoo.model("flux")
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_gradient_checkpointing()
        x = zoo.inputs("flux")["hidden_states"].clone().requires_grad_()
        results.append(loss_of("flux", model, x)[2])
    torch.testing.assert_close(*results)


# -- words and knobs ----------------------------------------------------------------------------------

PROMPT = "a red circle left of a blue circle"


def test_words_are_found_in_clip_and_t5_texts():
    clip, t5 = clip_tokenizer(24), t5_tokenizer(16)
    sd = SimpleNamespace(tokenizer=clip)
    assert word_places(sd, PROMPT, ["red circle", "blue"]) == ((2, 3), (7,))
    flux = SimpleNamespace(tokenizer=clip, tokenizer_2=t5)
    assert word_places(flux, PROMPT, ["red circle", "Blue Circle"]) == ((1, 2), (6, 7))
    sd3 = SimpleNamespace(tokenizer=clip, tokenizer_2=clip, tokenizer_3=t5)
    assert word_places(sd3, PROMPT, ["blue"]) == ((7, 24 + 6),)
    ids = t5(PROMPT).input_ids
    assert [t5.convert_ids_to_tokens(ids)[i] for i in (6, 7)] == ["▁blue", "▁circle"]
    with pytest.raises(mmattn.ConfigError, match="does not have the word 'circ'"):
        word_places(flux, PROMPT, ["circ"])
    with pytest.raises(mmattn.ConfigError, match="beyond the 16 tokens"):
        word_places(flux, "a " * 20 + "circle", ["circle"])
    with pytest.raises(mmattn.ConfigError, match="tokens="):
        word_places(SimpleNamespace(tokenizer=object()), PROMPT, ["red"])


@pytest.mark.parametrize(
    "knobs",
    [
        {"words": "circle"},
        {"words": ("a",), "tokens": ((1,),)},
        {"tokens": ((),)},
        {"alpha": -1},
        {"unit": "pixels"},
        {"tau": 1.0},
        {"segregation": -1},
        {"stop": 1.5},
        {"resolution": 0},
        {"depth": (0.6, 0.2)},
        {"over": "values"},
    ],
)
def test_bad_knobs(knobs):
    with pytest.raises(mmattn.ConfigError):
        AStar(**knobs)


def test_settings_round_trip_and_the_schedule_falls():
    method = AStar(tokens=((1, 2), (3,)), alpha=3.0)
    assert AStar.from_dict(method.to_dict()) == method
    assert AStar.from_dict({**method.to_dict(), "tokens": [[1, 2], [3]]}) == method
    sizes = [method.step_size(i, 5) for i in range(5)]
    assert (
        sizes[0] == 3 and sizes[-1] == pytest.approx(3 * 0.5**0.5) and sizes == sorted(sizes)[::-1]
    )
    assert [AStar(stop=0.5).phase(i, 4) for i in range(4)] == [True, True, False, False]


def test_attached_alone_it_says_who_moves_latents():
    with mmattn.attach(zoo.shared("flux"), AStar()) as session:
        session.step(0, 2)
        with pytest.raises(mmattn.ConfigError, match="AttentionGuidance"):
            zoo.call(zoo.shared("flux"), zoo.inputs("flux"))


def test_it_changes_no_output():
    model, x = zoo.shared("flux"), zoo.inputs("flux")
    stock = zoo.call(model, x)
    for method in (AStar(alpha=0), AStar()):
        with mmattn.attach(model, method) as session:
            session.step(0, 2)
            hook = model.register_forward_pre_hook(
                lambda *_, s=session: [m.update(watch=None) for m in memories(s, AStar)] and None
            )
            assert torch.equal(zoo.call(model, x), stock)
            hook.remove()
