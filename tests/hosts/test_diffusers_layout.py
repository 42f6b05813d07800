"""The token layout at every site: grids, where the image tokens are, two resolutions in one session."""

import dataclasses
from typing import ClassVar

import diffusers
import diffusers_zoo
import pytest
import torch
from diffusers_zoo import TEXT, ZOO, call, inputs, model, shared
from host_contract import _Any as AnySite, distance

import mmattn
from mmattn.layout import Layout

FLAT = [name for name in ZOO if not ZOO[name].pyramid]
JOINT = [name for name in FLAT if "joint" in ZOO[name].kinds]


@dataclasses.dataclass(frozen=True)
class Look(AnySite):
    """Writes down the layout and the queries of every call into `seen`."""

    name: ClassVar[str] = "look"
    seen: list = dataclasses.field(default_factory=list, compare=False, hash=False)

    def attend(self, q, k, v, *, mask, scale, site, dense):
        self.seen.append((site, site.layout, q.detach().clone(), k.shape[2]))
        return dense(q, k, v)


def look(m, kwargs):
    """``[(site, layout, q, keys)]`` of one forward."""
    method = Look()
    with mmattn.attach(m, method):
        call(m, kwargs)
    return method.seen


@dataclasses.dataclass(frozen=True)
class NeedsGrid(AnySite):
    """Asks for the grid at every image site."""

    name: ClassVar[str] = "needs-grid"
    kinds: ClassVar[tuple[str, ...]] = ("self", "joint", "cross")
    needs: ClassVar[frozenset[str]] = frozenset({"grid"})

    def attend(self, q, k, v, *, mask, scale, site, dense):
        where = site.layout.image_slice(q.shape[2])
        t, y, x = site.layout.grid_for(q.shape[2])
        assert where.stop - where.start == t * y * x
        return dense(q, k, v)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", FLAT)
def test_grid_at_every_site_and_resolution(name, batch):
    entry, method = ZOO[name], Look()
    with mmattn.attach(shared(name), method) as session:
        for grid in (entry.grid, entry.other, entry.grid):
            method.seen.clear()
            call(shared(name), inputs(name, batch, grid))
            assert len(method.seen) >= session.stats.planned
            for site, layout, q, _ in method.seen:
                if site.kind == "text":
                    assert layout.grid is None
                    continue
                t, y, x = grid
                assert layout.grid == layout.grid_for(q.shape[2]) == grid, site.path
                where = layout.image_slice(q.shape[2])
                assert where.stop - where.start == t * y * x
                assert layout.text == entry.text


def _poke(name, grid, cell):
    """Inputs of one call, and the same with the latent of one token changed."""
    before, after = inputs(name, 1, grid), inputs(name, 1, grid)
    key = next(k for k in ("hidden_states", "x") if k in before)
    latent = after[key]
    (_, y, x), (ct, cy, cx) = grid, cell
    if isinstance(latent, list):
        latent = latent[0][None]
    if latent.ndim == 3:
        latent[:, (ct * y + cy) * x + cx] += 3
        return before, after
    if name == "cogvideox":
        latent = latent.transpose(1, 2)
    py, px = latent.shape[-2] // y, latent.shape[-1] // x
    frames = latent if latent.ndim == 4 else latent[:, :, ct]
    frames[:, :, cy * py : (cy + 1) * py, cx * px : (cx + 1) * px] += 3
    return before, after


def _changed(a, b):
    return (a - b).abs().amax((0, 1, 3)).gt(1e-4).nonzero().flatten().tolist()


# Sana mixes tokens in its linear attention, before the first site.
@pytest.mark.parametrize("name", [n for n in FLAT if not ZOO[n].linear])
def test_one_latent_moves_exactly_its_own_query(name):
    """Before any mixing, the cell (t, y, x) is query row ``start + (t * Y + y) * X + x``."""
    grid = ZOO[name].grid
    cell = (grid[0] - 1, 1, grid[2] - 2)
    before, after = _poke(name, grid, cell)
    rows = zip(look(shared(name), before), look(shared(name), after), strict=True)
    site, layout, q, q2 = next(
        (site, layout, q, other)
        for (site, layout, q, _), (_, _, other, _) in rows
        if site.kind != "text"
    )
    start = layout.image_slice(q.shape[2]).start
    index = start + (cell[0] * grid[1] + cell[1]) * grid[2] + cell[2]
    assert _changed(q, q2) == [index], site.path


# Mochi pools the prompt into every token, and the queries of PRX are image tokens only.
@pytest.mark.parametrize("name", [n for n in JOINT if n not in ("prx", "mochi")])
def test_text_stays_outside_the_image_slice(name):
    """Changing the prompt moves only rows outside the image slice at the first joint site."""
    before, after = inputs(name), inputs(name)
    for key in ("encoder_hidden_states", "encoder_hidden_states_llama3", "cap_feats"):
        if key in after:
            after[key][0][:] += torch.linspace(-2, 2, after[key][0].numel()).view_as(after[key][0])
    if "input_ids" in after:
        after["input_ids"][:, 2] = 7
    rows = zip(look(shared(name), before), look(shared(name), after), strict=True)
    layout, q, q2 = next(
        (layout, q, other)
        for (site, layout, q, _), (_, _, other, _) in rows
        if site.kind == "joint"
    )
    where = layout.image_slice(q.shape[2])
    changed = _changed(q, q2)
    assert changed and not set(changed) & set(range(where.start, where.stop))
    assert where == (
        slice(q.shape[2] - 24, q.shape[2]) if layout.text == "before" else slice(0, 24)
    )


def test_mochi_drops_padded_text_row_by_row():
    kwargs = inputs("mochi", batch=2)
    kwargs["encoder_attention_mask"][1, 2:] = False
    seen = look(shared("mochi"), kwargs)
    assert [q.shape[:1] + q.shape[2:3] for _, _, q, _ in seen] == [(1, 28), (1, 26)] * 2
    assert all(layout.image_slice(q.shape[2]) == slice(0, 24) for _, layout, q, _ in seen)


def test_queries_of_prx_are_image_only():
    _, layout, q, keys = look(shared("prx"), inputs("prx"))[0]
    assert layout.image_slice(q.shape[2]) == slice(0, 24)
    assert keys == 24 + TEXT and layout.image_slice(keys) == slice(TEXT, keys)


def test_lumina2_rows_with_different_prompts_have_no_common_grid():
    kwargs = inputs("lumina2", batch=2)
    kwargs["encoder_attention_mask"][0, 3:] = False
    seen = look(shared("lumina2"), kwargs)
    assert all(layout.grid is None for _, layout, _, _ in seen)
    with (
        mmattn.attach(shared("lumina2"), NeedsGrid()),
        pytest.raises(mmattn.UnsupportedCall, match="text of different lengths"),
    ):
        call(shared("lumina2"), kwargs)


def test_reference_images_in_flux_ids():
    """Kontext puts a second image of the same size behind the first; another size has no grid."""
    m, kwargs = shared("flux"), inputs("flux", 1, (2, 4, 6))
    assert {layout.grid for _, layout, _, _ in look(m, kwargs)} == {(2, 4, 6)}
    small = inputs("flux", 1, (1, 2, 3))["img_ids"]
    kwargs["img_ids"] = torch.cat([kwargs["img_ids"][:42], small])
    assert {layout.grid for _, layout, _, _ in look(m, kwargs)} == {None}


def test_qwen_edit_calls_have_no_single_grid():
    m, kwargs = shared("qwenimage"), inputs("qwenimage", 1, (1, 4, 6))
    kwargs["img_shapes"] = [[(1, 2, 6), (1, 2, 6)]]
    assert {layout.grid for _, layout, _, _ in look(m, kwargs)} == {None}


@pytest.mark.parametrize("grid", [(1, 8, 12), (1, 12, 6), (1, 9, 7), (1, 5, 11)])
@pytest.mark.parametrize("name", ["unet", "unet-sdxl"])
def test_unet_pyramid(name, grid):
    """Every level of a UNet has the latent grid halved, odd sizes rounded up."""
    _, y, x = grid
    half = (1, -(-y // 2), -(-x // 2))
    seen = look(shared(name), inputs(name, 2, grid))
    grids = [layout.grid_for(q.shape[2]) for _, layout, q, _ in seen]
    assert set(grids) == {grid, half}
    for (site, _, q, _), (t, h, w) in zip(seen, grids, strict=True):
        assert q.shape[2] == t * h * w
        level = grid if site.path.startswith(("down_blocks.0", "up_blocks.1")) else half
        assert (t, h, w) == level, site.path


@pytest.mark.parametrize("grid", [(1, 8, 12), (1, 9, 7)])
def test_unet_pyramid_with_unpadded_downsampling(grid):
    """Convolutions without padding round odd sizes down."""
    m = diffusers.UNet2DConditionModel(**{**diffusers_zoo._UNET, "downsample_padding": 0}).eval()
    seen = look(m, inputs("unet", 1, grid))
    grids = {layout.grid_for(q.shape[2]) for _, layout, q, _ in seen}
    assert grids == {grid, (1, grid[1] // 2, grid[2] // 2)}


def test_layout_refuses_what_it_does_not_know():
    layout = Layout(grid=(1, 4, 6), pyramid=True)
    with pytest.raises(mmattn.UnsupportedCall, match="No halving"):
        layout.grid_for(7)
    with pytest.raises(mmattn.UnsupportedCall, match="no token grid"):
        Layout().grid_for(7)
    with pytest.raises(mmattn.UnsupportedCall, match="25 tokens"):
        Layout(grid=(1, 4, 6)).image_slice(25)


@pytest.mark.parametrize("name", ["wan", "qwenimage"])
def test_grids_from_shapes_survive_compiling(name):
    """Attach first, compile second: the hook itself is traced and still finds the grid."""
    with mmattn.attach(shared(name), NeedsGrid()) as session:
        optimised = torch.compile(shared(name), fullgraph=True, backend="eager")
        for grid in (ZOO[name].grid, ZOO[name].other):
            call(optimised, inputs(name, 1, grid))
            assert session.runs[0].layout.grid == grid
        assert session.stats.executed == session.stats.planned > 0


def test_flux_ids_under_a_traced_hook_are_refused_with_advice():
    """Attached before compiling, the values of the ids cannot be read."""
    m, kwargs = model("flux"), inputs("flux")
    with mmattn.attach(m, NeedsGrid()):
        optimised = torch.compile(m, fullgraph=True, backend="eager")
        # Dynamo wraps what is raised while it traces; the sentence stays readable.
        with pytest.raises(Exception, match=r"UnsupportedCall.*compile first, then attach"):
            call(optimised, kwargs)
        torch._dynamo.reset()
        optimised = torch.compile(m, backend="eager")
        with pytest.raises(mmattn.UnsupportedCall, match="compile first, then attach"):
            call(optimised, kwargs)
    torch._dynamo.reset()
    stock = call(m, kwargs)
    with mmattn.attach(m, NeedsGrid(), unsupported="dense"):
        optimised = torch.compile(m, fullgraph=True, backend="eager")
        assert distance(call(optimised, kwargs), stock) < 1e-5
