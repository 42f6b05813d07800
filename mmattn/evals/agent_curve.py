"""What agent attention costs and saves on the embedded generators, next to others at equal cost.

    python -m mmattn.evals.agent_curve --out docs/agent-attention

`AgentAttention` is compared with neighborhood attention, with token merging and with averaged keys, over
budgets. The budget is the share of dense attention's multiply-adds, with text and dense steps, without
matching and pooling. Each is used in all steps, in all but the first quarter, in the last 40 % only, and in
the first 40 % only, which is how the authors of agent attention use it in Stable Diffusion. Pictures and
clips are judged by the oracle and compared with those of the untouched model, same prompts and noise.

`ToMe` itself declines both models, whose rotary positions have one row per token. `MergedTokens` below is
what is left of it: the same matching, after queries and keys are rotated.

Results are written after every setting, and what is written is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mmattn.attaching import attach
from mmattn.calls import draw
from mmattn.errors import ConfigError
from mmattn.evals.quality import psnr, ssim
from mmattn.evals.sparsity import HELD_OUT_SEED, interval
from mmattn.loading import Loaded, resolve
from mmattn.measuring import environment
from mmattn.methods import _merging as merging
from mmattn.methods._image_attention import Part, Sparse
from mmattn.methods._sparse_method import SparseMethod
from mmattn.methods.agent_attention import AgentAttention
from mmattn.methods.base import Method
from mmattn.methods.neighborhood import NeighborhoodAttention

SPANS: dict[str, tuple[float, float]] = {
    "all steps": (0.0, 1.0),
    "first quarter dense": (0.25, 1.0),
    "last 40 % only": (0.6, 1.0),
    "first 40 % only": (0.0, 0.4),
}
"""Shares of the steps between which attention is replaced."""


@dataclass(frozen=True, kw_only=True)
class _Until(SparseMethod):
    """A sparse method that stops.

    Args:
        until: share of the steps after which attention is dense again, in (0, 1].
    """

    until: float = 1.0

    def phase(self, step: int | None, total: int | None) -> int | bool | None:
        """True between `dense_steps` and `until`."""
        begun = super().phase(step, total)
        if self.until == 1:
            return begun
        if step is None or total is None:
            return None
        return bool(begun) and step < ceil(self.until * total)


@dataclass(frozen=True, kw_only=True)
class MergedTokens(_Until):
    """Token merging behind rotary positions: similar image tokens share one query, key and value.

    ToMe's matching on the mean of the keys over heads, one destination in the corner of every 2 x 2 cell;
    queries, keys and values of merged tokens are averaged, attention runs on what is left and text, and every
    token takes the output of the one it went into. ToMe merges before the projections, which a model with
    a rotary row per token does not allow; that is all the difference. A comparator of this file.

    Args:
        kept: image tokens that remain, a share of them in [1/4, 1].
    """

    name: ClassVar[str] = "merged-tokens"
    probes: ClassVar[bool] = False

    kept: float = 0.5

    def sparse(self, part: Part) -> Sparse:
        """Merge, attend, spread."""
        q, k, v, text = part.q, part.image_keys, part.v[:, :, part.text :], part.text
        b, heads, n, d = q.shape
        is_dst = merging.cells(part.grid, None, q.device)
        order = (~is_dst).to(torch.uint8).argsort(stable=True)
        count = int(is_dst.sum())
        left = max(count, round(self.kept * n))
        source = merging.match(k.mean(1), order[count:], order[:count], n - left)

        def merged(x: Tensor) -> Tensor:
            flat = x.transpose(1, 2).flatten(2)
            flat = merging.average(flat, source, flat.new_ones(b, n), left)
            few: Tensor = flat.unflatten(2, (heads, d)).transpose(1, 2)
            return few

        keys = torch.cat([part.k[:, :, :text], merged(k)], 2)
        values = torch.cat([part.v[:, :, :text], merged(v)], 2)
        few = F.scaled_dot_product_attention(merged(q), keys, values, scale=part.scale)
        out = merging.spread(few.transpose(1, 2).flatten(2), source)
        # All pairs but those of text queries; the frame counts image queries with text by itself.
        density = (left * (text + left) - n * text) / n**2
        return Sparse(out.unflatten(2, (heads, d)).transpose(1, 2), density)


@dataclass(frozen=True, kw_only=True)
class AveragedKeys(_Until):
    """Image queries see keys and values averaged over a grid of cells: agents' pooling without agents.

    A comparator of this file.

    Args:
        cells: cells along (t, y, x).
    """

    name: ClassVar[str] = "averaged-keys"
    probes: ClassVar[bool] = False

    cells: tuple[int, int, int] = (1, 4, 4)

    def sparse(self, part: Part) -> Sparse:
        """Average, attend."""
        n = part.q.shape[2]
        (t, y, x), (frames, rows, cols) = self.cells, part.grid
        size = (min(t, frames), min(y, rows), min(x, cols))

        def averaged(x: Tensor) -> Tensor:
            image = x[:, :, part.text :]
            volume = image.transpose(2, 3).reshape(-1, x.shape[-1], *part.grid)
            cells = F.adaptive_avg_pool3d(volume, size).flatten(2).transpose(1, 2)
            return torch.cat(
                [x[:, :, : part.text], cells.reshape(*x.shape[:2], -1, x.shape[-1])], 2
            )

        k, v = averaged(part.k), averaged(part.v)
        out = F.scaled_dot_product_attention(part.q, k, v, scale=part.scale)
        return Sparse(out, size[0] * size[1] * size[2] / n)


@dataclass(frozen=True, kw_only=True)
class Windows(_Until, NeighborhoodAttention):
    """Neighborhood attention that stops, see `_Until`."""

    name: ClassVar[str] = "windows"


@dataclass(frozen=True)
class Setting:
    """One point of a curve: its family, its span of steps, and the method."""

    family: str
    span: str
    method: Method

    @property
    def key(self) -> str:
        """What it is called in the record."""
        return f"{self.family} | {self.span} | {json.dumps(self.method.to_dict(), sort_keys=True)}"


def settings(kind: str) -> list[Setting]:
    """The ladder for the grids of the embedded models, 8 x 8 tokens and 5 x 6 x 6.

    The ordinary scale is tried in all steps only. Clips take long and have two rungs.
    """
    still = kind == "t2i"
    agents = [(25, None), (16, None), (9, None), (4, None)]
    windows: list[Any] = [(1, 6, 6), (1, 5, 5), (1, 4, 4), (1, 2, 2)]
    kept = [0.84, 0.69, 0.55, 0.42]
    cells = [(1, 6, 6), (1, 5, 5), (1, 4, 4), (1, 2, 2)]
    if not still:
        agents = [(9, None), (4, None)]
        windows = [(5, 3, 6), (5, 3, 3)]
        kept = [0.71, 0.47]
        cells = [(5, 4, 4), (5, 3, 3)]
    found = []
    for span, (start, stop) in SPANS.items():
        for (count, frames), window, share, size in zip(agents, windows, kept, cells, strict=True):
            times: dict[str, Any] = {"dense_steps": start, "until": stop}
            own: dict[str, Any] = {"agent_frames": frames, "start": start, "stop": stop}
            found.append(Setting("agents", span, AgentAttention(agents=count, **own)))
            if span == "all steps":
                plain = AgentAttention(agents=count, k_scale2=1.0, k_shortcut=0.0, **own)
                found.append(Setting("agents, ordinary scale", span, plain))
            found += [
                Setting("neighborhood", span, Windows(window=window, **times)),
                Setting("merged tokens", span, MergedTokens(kept=share, **times)),
                Setting("averaged keys", span, AveragedKeys(cells=size, **times)),
            ]
    return found


def measure(
    loaded: Loaded,
    path: Path,
    prompts: int = 24,
    steps: int = 10,
    chosen: Callable[[str], Sequence[Setting]] = settings,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Run the settings that `path` does not have for this model, and write it after each.

    Raises:
        ConfigError: the file is from other numbers of prompts or steps.
    """
    from mmattn.mini.oracle import judge_clips, judge_scenes
    from mmattn.mini.scenes import make_clips, make_scenes

    kind = loaded.kind
    wanted: Any = (make_scenes if kind == "t2i" else make_clips)(prompts, HELD_OUT_SEED)
    judge: Any = judge_scenes if kind == "t2i" else judge_clips
    captions = [item.caption for item in wanted]
    seeds = range(HELD_OUT_SEED, HELD_OUT_SEED + prompts)

    def film() -> tuple[Tensor, float]:
        began = time.process_time()
        drawn = draw(loaded, captions, seeds, steps=steps, batch=16)
        return drawn, round(time.process_time() - began, 2)

    conditions = {"prompts": prompts, "steps": steps, "seed": HELD_OUT_SEED}
    record: dict[str, Any] = {**conditions, "environment": environment(torch.device("cpu"))}
    if path.exists():
        record = json.loads(path.read_text("utf-8"))
        if {name: record[name] for name in conditions} != conditions:
            raise ConfigError(
                f"{path} is not from {conditions}; name another folder or remove the file."
            )
    rows = record.setdefault("rows", {})
    dense, seconds = film()

    def figures(drawn: Tensor) -> dict[str, Any]:
        right = torch.tensor([float(v["all"]) for v in judge(drawn, wanted)])
        likeness = psnr(drawn, dense)
        return {
            "all": round(float(right.mean()), 4),
            "all_95": [round(x, 4) for x in interval(right)],
            "psnr": round(float(likeness.mean()), 3),
            "psnr_95": [round(x, 3) for x in interval(likeness)],
            "ssim": round(float(ssim(drawn, dense).mean()), 4),
        }

    rows["dense"] = {"family": "dense", "cost": 1.0, "cpu_seconds": seconds, **figures(dense)}
    for setting in chosen(kind):
        if setting.key in rows:
            continue
        with attach(loaded.target, setting.method) as session:
            drawn, seconds = film()
            stats = session.stats
        assert stats.density is not None
        rows[setting.key] = {
            "family": setting.family,
            "span": setting.span,
            "cost": round(stats.density, 4),
            "cpu_seconds": seconds,
            **figures(drawn),
            "method": json.loads(json.dumps(setting.method.to_dict())),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        found = rows[setting.key]
        progress(
            f"{kind} {setting.family}, {setting.span}: cost {found['cost']:.3f}, "
            f"{100 * found['all']:.0f} % right, {found['psnr']:.1f} dB"
        )
    return record


def examples(loaded: Loaded, steps: int, prompts: int = 6) -> dict[str, Tensor]:
    """Pictures of the first prompts at about half of the cost in all steps, by family."""
    from mmattn.mini.scenes import make_scenes

    captions = [scene.caption for scene in make_scenes(prompts, HELD_OUT_SEED)]
    seeds = range(HELD_OUT_SEED, HELD_OUT_SEED + prompts)
    rows = {"dense": draw(loaded, captions, seeds, steps=steps)}
    ladder = settings("t2i")
    # The second and third rungs of the ladder, where the families meet.
    second, third = ladder[5:10], ladder[10:15]
    late = [s for s in ladder if s.span == "first quarter dense" and s.family == "agents"][1:2]
    for setting in (*second[:2], *third[2:], *late):
        with attach(loaded.target, setting.method) as session:
            drawn = draw(loaded, captions, seeds, steps=steps)
            cost = session.stats.density
        rows[f"{setting.family}, {setting.span}, {cost:.2f}"] = drawn
    return rows


def times(
    loaded: Loaded, sides: Sequence[int] = (128, 256, 512), repeats: int = 5
) -> list[dict[str, Any]]:
    """Milliseconds inside the attention of one forward at larger pictures, a quarter of the pairs each.

    The embedded picture model is run far beyond its training size; only its time is looked at.
    """
    from mmattn.methods.identity import Identity

    rows = []
    for side in sides:
        grid = side // 8
        methods: dict[str, Method] = {
            "dense": Identity(),
            "agents": AgentAttention(agents=round((grid**2 / 8) ** 0.5) ** 2),
            "neighborhood": NeighborhoodAttention(window=(1, grid // 2, grid // 2)),
            "merged tokens": MergedTokens(kept=0.5),
            "averaged keys": AveragedKeys(cells=(1, grid // 2, grid // 2)),
        }
        best: dict[str, float] = {}
        costs: dict[str, float] = {}
        for _ in range(repeats):
            for name, method in methods.items():
                with attach(loaded.target, method) as session:
                    draw(
                        loaded,
                        ["a red circle on a white background"],
                        [0],
                        steps=1,
                        guidance=1.0,
                        height=side,
                        width=side,
                    )
                    stats = session.stats
                spent = sum(site.milliseconds for site in stats.sites)
                best[name] = min(spent, best.get(name, spent))
                costs[name] = 1.0 if stats.density is None else stats.density
        rows += [
            {
                "tokens": grid**2,
                "family": name,
                "cost": round(costs[name], 3),
                "milliseconds": round(best[name], 1),
            }
            for name in methods
        ]
    return rows


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write, plot; one thread."""
    from mmattn.evals._agent_plot import markdown, plot, strip

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("docs/agent-attention"))
    parser.add_argument("--models", nargs="+", default=["t2i", "t2v"], choices=["t2i", "t2v"])
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    for kind in options.models:
        loaded = resolve(kind)
        loaded.target.set_progress_bar_config(disable=True)
        path = options.out / f"{kind}.json"
        record = measure(loaded, path, options.prompts, options.steps, progress=_say)
        if kind == "t2i":
            strip(examples(loaded, options.steps), options.out / "pictures.png")
            record["times"] = record.get("times") or times(loaded)
            path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    paths = [options.out / f"{kind}.json" for kind in ("t2i", "t2v")]
    records = {p.stem: json.loads(p.read_text("utf-8")) for p in paths if p.exists()}
    plot(records, options.out / "curve.png")
    sys.stdout.write(markdown(records))


if __name__ == "__main__":
    main()
