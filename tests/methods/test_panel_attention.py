"""PanelAttention: masks written pair by pair, exact isolation, groups, cost."""

from __future__ import annotations

import time
from itertools import product
from typing import ClassVar

import diffusers_zoo as zoo
import pytest
import torch
import torch.nn.functional as F

import mmattn
import mmattn.mini
from mmattn.methods.panel_attention import PanelAttention, Parts, plan_calls

GRID = (1, 4, 6)
MATRIX = ((1, 0, 0), (1, 1, 0), (0, 0, 1))


def may_see(method, query, key):
    """The rule for one pair; a token is ``("image" | "text", panel or None)``."""
    (q_kind, q_panel), (k_kind, k_panel) = query, key
    sees = method.sees
    if q_kind == k_kind == "image":
        return sees[q_panel][k_panel]
    if method.text == "split":
        return q_panel == k_panel
    if q_kind == "text" and k_kind == "image":
        return all(row[k_panel] for row in sees)
    return True


def tokens_of(method, grid, text, before):
    """Kind and panel of every token of a canvas, in the order of the sequence."""
    n = method.count
    piece = text // n if method.text == "split" else 0
    words = [("text", i // piece if piece else None) for i in range(text)]
    _, height, width = grid
    cells = [
        ("image", y // (height // method.rows) * method.cols + x // (width // method.cols))
        for y, x in product(range(height), range(width))
    ]
    return words + cells if before else cells + words


class Masked(mmattn.Method):
    """The oracle: dense attention with the mask of `may_see`."""

    name: ClassVar[str] = "masked"
    kinds: ClassVar[tuple[str, ...]] = ("self", "joint", "cross")
    masks: ClassVar[bool] = True

    def __init__(self, rule):
        object.__setattr__(self, "rule", rule)

    def accepts(self, site):
        return self.rule.accepts(site)

    def attend(self, q, k, v, *, mask, scale, site, dense):
        grid, before = site.layout.grid, site.layout.text == "before"
        inside = grid[1] * grid[2]
        if site.kind == "cross":
            queries = tokens_of(self.rule, grid, 0, True)
            keys = tokens_of(self.rule, grid, k.shape[2], True)[: k.shape[2]]
        else:
            queries = keys = tokens_of(self.rule, grid, q.shape[2] - inside, before)
        seen = torch.tensor([[may_see(self.rule, a, b) for b in keys] for a in queries])[None, None]
        if mask is not None:
            seen = seen & (mask >= 0 if mask.dtype != torch.bool else mask)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)


METHODS = {
    "isolated": PanelAttention(cols=3),
    "isolated split": PanelAttention(cols=3, text="split"),
    "group": PanelAttention(rows=2, cols=3, visibility="group"),
    "reference-blocked": PanelAttention(cols=3, visibility="reference-blocked", references=2),
    "matrix": PanelAttention(cols=3, visibility=MATRIX),
    "matrix split": PanelAttention(cols=3, visibility=MATRIX, text="split"),
    "full split": PanelAttention(rows=2, cols=1, visibility="full", text="split"),
}


def inputs(name, text=6, batch=1):
    kwargs = zoo.inputs(name, batch, GRID)
    if name == "pixart":
        text = 2 * text  # two words per panel at least: one of them is masked
        kwargs["encoder_hidden_states"] = zoo.rand(batch, text, 16)
        kwargs["encoder_attention_mask"] = torch.ones(batch, text).index_fill(
            1, torch.tensor([1]), 0
        )
        return kwargs
    kwargs["encoder_hidden_states"] = zoo.rand(
        batch, text, *kwargs["encoder_hidden_states"].shape[2:]
    )
    if "txt_ids" in kwargs:
        kwargs["txt_ids"] = torch.zeros(text, kwargs["txt_ids"].shape[1])
    return kwargs


@pytest.mark.parametrize("family", ["flux", "flux2", "sd3", "pixart"])
@pytest.mark.parametrize("name", METHODS)
def test_equals_a_mask_written_pair_by_pair(family, name):
    model, kwargs, method = zoo.shared(family), inputs(family, batch=2), METHODS[name]
    with mmattn.attach(model, Masked(method)):
        want = zoo.call(model, kwargs)
    with mmattn.attach(model, method) as session:
        got = zoo.call(model, kwargs)
    assert (got - want).abs().max() < 2e-6 * want.abs().max().clamp(min=1)
    assert (got - zoo.call(model, kwargs)).abs().max() > 1e-4
    assert session.stats.calls == session.stats.planned
    for (
        site
    ) in session.stats.sites:  # image tokens alone, all of which see each other: nothing to do
        whole = site.kind == "self" and all(map(all, method.sees))
        assert site.density == 1 if whole else site.density < 1
    for row in session.plan.rows:
        assert bool(row.methods) == (row.site.kind != "cross" or method.text == "split")


def test_equals_flux_own_mask():
    model, kwargs, method = zoo.shared("flux"), inputs("flux"), METHODS["group"]
    tokens = tokens_of(method, GRID, 6, True)
    seen = torch.tensor([[may_see(method, a, b) for b in tokens] for a in tokens])[None, None]
    want = zoo.call(model, {**kwargs, "joint_attention_kwargs": {"attention_mask": seen}})
    with mmattn.attach(model, method):
        got = zoo.call(model, kwargs)
    assert (got - want).abs().max() < 2e-6


@pytest.fixture(scope="module")
def embedded():
    return mmattn.mini.load("t2i").transformer


def test_equals_a_mask_on_the_embedded_model(embedded):
    grid = (1, 8, 16)
    kwargs = {
        "hidden_states": zoo.rand(1, 128, 32),
        "encoder_hidden_states": zoo.rand(1, 32, 96),
        "pooled_projections": zoo.rand(1, 64),
        "timestep": torch.tensor([0.7]),
        "img_ids": zoo._ids(*grid),
        "txt_ids": torch.zeros(32, 3),
    }
    for method in (PanelAttention(), PanelAttention(rows=2, cols=2, visibility="group")):
        with mmattn.attach(embedded, Masked(method)):
            want = zoo.call(embedded, kwargs)
        with mmattn.attach(embedded, method):
            got = zoo.call(embedded, kwargs)
        assert (got - want).abs().max() < 1e-4 * want.abs().max()


def panel_of_cells():
    return torch.tensor([p for _, p in tokens_of(PanelAttention(cols=3), GRID, 0, True)])


def perturbed(family, kwargs, panel):
    """The same call with other latents in one panel."""
    x = kwargs["hidden_states"].clone()
    if x.ndim == 3:
        x[:, panel_of_cells() == panel] += 1.0
    else:
        width = x.shape[3] // 3
        x[..., panel * width : (panel + 1) * width] += 1.0
    return {**kwargs, "hidden_states": x}


def panels_changed(family, method, panel):
    """Panels whose output is not bitwise the same after `panel` was changed."""
    model, kwargs = zoo.shared(family), inputs(family)
    with mmattn.attach(model, method):
        one, two = (zoo.call(model, k) for k in (kwargs, perturbed(family, kwargs, panel)))
    if one.ndim == 3:
        moved = (one != two).any(2)[0]
        return {int(p) for p in panel_of_cells()[moved].unique()}
    moved = (one != two).flatten(0, 2).any(0).unflatten(0, (3, -1)).any(1)
    return {int(p) for p in moved.nonzero()}


@pytest.mark.parametrize("family", ["flux", "flux2", "sd3", "pixart"])
@pytest.mark.parametrize("text", ["shared", "split"])
def test_nothing_leaks_between_isolated_panels(family, text):
    method = PanelAttention(cols=3, text=text)
    assert panels_changed(family, method, 1) == {1}
    assert panels_changed(family, PanelAttention(cols=3, visibility="group"), 1) == {0, 1, 2}


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_what_a_matrix_hides_stays_hidden(family):
    blocked = METHODS["reference-blocked"]
    assert panels_changed(family, blocked, 2) == {2}
    assert panels_changed(family, blocked, 0) == {0, 1, 2}
    one_way = METHODS["matrix"]
    assert panels_changed(family, one_way, 0) == {0, 1}
    assert panels_changed(family, one_way, 1) == {1}
    chain = PanelAttention(cols=3, visibility=((1, 1, 0), (0, 1, 1), (0, 0, 1)))
    assert panels_changed(family, chain, 2) == {0, 1, 2}  # 2 -> 1 -> 0 over two layers


def test_full_visibility_is_the_untouched_model():
    for method in (PanelAttention(visibility="full"), PanelAttention(rows=1, cols=1)):
        model, kwargs = zoo.shared("flux"), inputs("flux")
        want = zoo.call(model, kwargs)
        with mmattn.attach(model, method) as session:
            assert torch.equal(zoo.call(model, kwargs), want)
        assert session.stats.density == 1.0


def test_every_query_is_in_one_call_and_pairs_are_the_rule():
    method = PanelAttention(cols=3, visibility=MATRIX, text="split")
    tokens = tokens_of(method, GRID, 6, True)
    panels = tuple((panel_of_cells() == i).nonzero()[:, 0] + 6 for i in range(3))
    calls = plan_calls(method.sees, Parts(panels, torch.arange(6).chunk(3), True, False))
    assert torch.cat([c.rows for c in calls]).sort().values.equal(torch.arange(30))
    seen = torch.zeros(30, 30, dtype=torch.bool)
    for rows, keys in calls:
        seen[rows[:, None], keys] = True
    assert seen.tolist() == [[bool(may_see(method, a, b)) for b in tokens] for a in tokens]


def test_density_and_recall():
    model, kwargs = zoo.shared("flux"), inputs("flux")
    with mmattn.attach(model, PanelAttention(cols=3, text="split"), probe=True) as session:
        zoo.call(model, kwargs)
    assert session.stats.density == pytest.approx(1 / 3)
    recall = session.stats.sites[0].recall
    assert 0.2 < recall < 0.6
    with mmattn.attach(model, PanelAttention(cols=3, visibility="group"), probe=True) as session:
        zoo.call(model, kwargs)
    assert recall < session.stats.sites[0].recall < 1


def test_isolated_panels_are_far_cheaper_than_a_mask():
    n, side, heads = 8, 1024, 2
    q, k, v = (zoo.rand(1, heads, n * side, 32, seed=s) for s in range(3))
    owner = torch.arange(n * side) // side
    mask = (owner[:, None] == owner)[None, None]
    panels = torch.arange(n * side).chunk(n)
    method = PanelAttention(cols=n)
    calls = plan_calls(method.sees, Parts(panels, (), False, False))
    began = time.process_time()
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    masked = time.process_time() - began
    began = time.process_time()
    got = torch.empty_like(q)
    for rows, keys in calls:
        got[:, :, rows] = F.scaled_dot_product_attention(
            q[:, :, rows], k[:, :, keys], v[:, :, keys]
        )
    apart = time.process_time() - began
    assert torch.allclose(got, want, atol=1e-6)
    assert sum(len(r) * len(k) for r, k in calls) * n == (n * side) ** 2
    assert apart < masked / 2  # measured: 9 times less


def test_compiles_in_one_graph():
    model, kwargs = zoo.model("sd3"), inputs("sd3")
    with mmattn.attach(model, PanelAttention(cols=3)):
        want = zoo.call(model, kwargs)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.allclose(zoo.call(compiled, kwargs), want, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": 0}, "at least 1"),
        ({"members": 1}, "at least 2"),
        ({"visibility": "some"}, "one of"),
        ({"visibility": ((1, 0),)}, "2 rows of 2 bools"),
        ({"visibility": ((1, 0), (0, 0))}, "hides panels \\[1\\] from itself"),
        ({"visibility": "reference-blocked"}, "from 1 to 1"),
        ({"references": 3}, "from 0 to 2"),
        ({"text": "mine"}, "shared or split"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(mmattn.ConfigError, match=message):
        PanelAttention(**settings)


def test_settings_survive_json():
    method = PanelAttention(cols=3, visibility=[[1, 0, 1], [0, 1, 0], [0, 0, 1]])
    assert PanelAttention.from_dict(method.to_dict()) == method
    assert PanelAttention(members=2).text == "split"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (PanelAttention(cols=4), "1 x 4 panels do not divide the token grid"),
        (PanelAttention(cols=3, rows=4, text="split"), "6 text tokens do not divide into 12"),
        (PanelAttention(members=2, visibility="group"), "batch of 1 rows"),
    ],
)
def test_calls_that_do_not_fit(method, message):
    with (
        pytest.raises(mmattn.UnsupportedCall, match=message),
        mmattn.attach(zoo.shared("flux"), method),
    ):
        zoo.call(zoo.shared("flux"), inputs("flux"))
