"""The comparators of agent attention, what they cost, and the record of the curve."""

import json

import pytest
import torch
import torch.nn.functional as F

from mmattn.attaching import attach
from mmattn.calls import draw
from mmattn.errors import ConfigError
from mmattn.evals import _agent_plot, agent_curve as ac
from mmattn.loading import resolve
from mmattn.methods._image_attention import Part

GRID = (1, 4, 6)


def part(grid=GRID, text=3, d=8):
    draw = torch.Generator().manual_seed(0)
    n = grid[0] * grid[1] * grid[2]
    q = torch.randn(2, 2, n, d, generator=draw)
    k, v = (torch.randn(2, 2, text + n, d, generator=draw) for _ in range(2))
    return Part(q, k, v, text, grid, None, False, slice(0, 2), None)


def test_keeping_all_tokens_is_dense_attention():
    p = part()
    dense = F.scaled_dot_product_attention(p.q, p.k, p.v)
    for method in (ac.MergedTokens(kept=1.0), ac.AveragedKeys(cells=(1, 4, 6))):
        found = method.sparse(p)
        torch.testing.assert_close(found.out, dense)
        assert found.density == pytest.approx(1.0)


def test_merged_tokens_share_queries_and_rows_do_not_depend_on_each_other():
    p = part()
    found = ac.MergedTokens(kept=0.5).sparse(p)
    rows = found.out[0].transpose(0, 1).flatten(1)
    assert len(torch.unique(rows, dim=0)) == 12
    assert found.density * 24**2 + 24 * 3 == pytest.approx(12 * 15)
    alone = p._replace(q=p.q[1:], k=p.k[1:], v=p.v[1:])
    torch.testing.assert_close(ac.MergedTokens(kept=0.5).sparse(alone).out, found.out[1:])


def test_equal_tokens_merge_without_loss_where_random_ones_do_not():
    p = part(text=0)
    tile = torch.randn(2, 2, 2, 3, 8)
    same = [t.repeat_interleave(2, 2).repeat_interleave(2, 3).flatten(2, 3) for t in [tile] * 3]
    equal = p._replace(q=same[0], k=same[1], v=same[2])
    for case, exact in ((equal, True), (p, False)):
        out = ac.MergedTokens(kept=0.25).sparse(case).out
        dense = F.scaled_dot_product_attention(case.q, case.k, case.v)
        assert torch.allclose(out, dense, atol=1e-4) == exact


def test_averaged_keys_equal_a_loop():
    p = part()
    found = ac.AveragedKeys(cells=(1, 2, 3)).sparse(p)

    def averaged(x):
        cells = []
        for y in (0, 2):
            for z in (0, 2, 4):
                at = [3 + 6 * r + c for r in (y, y + 1) for c in (z, z + 1)]
                cells.append(x[:, :, at].mean(2))
        return torch.cat([x[:, :, :3], torch.stack(cells, 2)], 2)

    expected = F.scaled_dot_product_attention(p.q, averaged(p.k), averaged(p.v))
    torch.testing.assert_close(found.out, expected)
    assert found.density == pytest.approx(6 / 24)


def test_spans_of_steps():
    for span, acting in {
        "all steps": range(10),
        "first quarter dense": range(2, 10),
        "last 40 % only": range(6, 10),
        "first 40 % only": range(4),
    }.items():
        settings = {s.family: s.method for s in ac.settings("t2i") if s.span == span}
        assert ("agents, ordinary scale" in settings) == (span == "all steps")
        for family in ("neighborhood", "merged tokens", "averaged keys"):
            steps = [i for i in range(10) if settings[family].phase(i, 10)]
            assert steps == list(acting), (span, family)
        agents = [i for i in range(10) if settings["agents"].phase(i, 10)]
        # Agents round their start up, the others down.
        assert set(agents) <= set(acting) and len(agents) >= len(acting) - 1
    assert ac.MergedTokens(until=0.4).phase(None, None) is None
    assert ac.MergedTokens().phase(None, None) is True


@pytest.fixture(scope="module")
def t2i():
    loaded = resolve("t2i")
    loaded.target.set_progress_bar_config(disable=True)
    return loaded


def test_families_of_a_rung_cost_about_the_same(t2i):
    costs = []
    for setting in [s for s in ac.settings("t2i") if s.span == "all steps"][5:10]:
        with attach(t2i.target, setting.method) as session:
            draw(t2i, ["a red circle on a white background"], [0], steps=1)
            costs.append(session.stats.density)
    assert min(costs) > 0.5 and max(costs) < 0.65
    # 16 text tokens, 64 of the picture, 25 of which a window of 5 x 5 sees.
    assert costs[2] == pytest.approx((16 * 80 + 64 * (16 + 25)) / 80**2)


def test_record_goes_on_where_it_stopped(t2i, tmp_path):
    path = tmp_path / "curve.json"
    chosen = [s for s in ac.settings("t2i") if s.span == "first quarter dense"][:3]
    calls = []
    record = ac.measure(t2i, path, 2, 4, lambda kind: chosen[:2], calls.append)
    record = ac.measure(t2i, path, 2, 4, lambda kind: chosen, calls.append)
    assert len(calls) == 3 and json.loads(path.read_text()) == record
    rows = [record["rows"][s.key] for s in chosen]
    assert all(0.7 < row["cost"] < 1 and row["psnr"] < 90 for row in rows)
    assert record["rows"]["dense"]["psnr"] == 100
    with pytest.raises(ConfigError, match="not from"):
        ac.measure(t2i, path, 3, 4)
    text = _agent_plot.markdown({"t2i": record})
    assert text.count("first quarter dense") == 3
    pytest.importorskip("matplotlib", reason="plots need the extra [eval]")
    assert _agent_plot.plot({"t2i": record}, tmp_path / "curve.png").stat().st_size > 10_000
