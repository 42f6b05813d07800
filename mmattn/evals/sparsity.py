"""What sparse attention costs in quality: methods at equal densities on the embedded video model.

    python -m mmattn.evals.sparsity --out docs/video

Every setting draws the same held-out captions from the same noise. The oracle says how many clips show
the colour, shape, background and direction of their caption; PSNR and SSIM compare with the clips of the
untouched model. Writes ``sparsity.json``, and the plots ``sparsity.png`` and ``clips.png``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmattn.attaching import attach
from mmattn.calls import draw
from mmattn.errors import MissingExtraError
from mmattn.evals.quality import psnr, ssim
from mmattn.loading import Loaded, resolve
from mmattn.measuring import environment
from mmattn.methods.base import Method
from mmattn.methods.flexprefill import FlexPrefill
from mmattn.methods.neighborhood import NeighborhoodAttention
from mmattn.methods.proxyattn import ProxyAttn
from mmattn.methods.random_blocks import RandomBlocks
from mmattn.methods.sliding_window import SlidingWindow
from mmattn.methods.sparsed import SparseD
from mmattn.methods.vmoba import VMoBA

DENSITIES = (0.5, 0.25, 0.15)
"""Shares of the query-key pairs kept in sparse steps."""

HELD_OUT_SEED = 900_000


@dataclass(frozen=True)
class Rung:
    """One setting: a family, its nominal density in sparse steps, and the method."""

    family: str
    density: float
    method: Method


def ladder(dense_steps: float) -> list[Rung]:
    """Settings for the embedded model's grid of 5 x 6 x 6 tokens, as near to `DENSITIES` as they come.

    Chunks and blocks have about nine tokens, a twentieth of the clip; windows have 90, 45 and 27.
    """
    chunks = (0.25, (1, 1), (1, 3, 3))
    # Of 20, 36 and 20 chunks. Rounded down, so that VMoBA never keeps more than the others.
    kept = {0.5: (10, 18, 10), 0.25: (5, 9, 5), 0.15: (3, 5, 3)}
    windows = {0.5: (5, 3, 6), 0.25: (5, 3, 3), 0.15: (3, 3, 3)}
    # A window of every second token reaches over the whole picture; of half the tokens, along one axis.
    dilated: dict[float, tuple[Any, Any]] = {
        0.5: (((5, 3, 6), (5, 6, 3)), ((1, 2, 1), (1, 1, 2))),
        0.25: ((5, 3, 3), (1, 2, 2)),
        0.15: ((3, 3, 3), (1, 2, 2)),
    }
    rungs = []
    for density in DENSITIES:
        methods: dict[str, Method] = {
            "VMoBA": VMoBA(topk=kept[density], chunks=chunks, dense_steps=dense_steps),
            "neighborhood": NeighborhoodAttention(window=windows[density], dense_steps=dense_steps),
            "sliding window": SlidingWindow(window=round(180 * density), dense_steps=dense_steps),
            "dilated neighborhood": NeighborhoodAttention(
                window=dilated[density][0], dilation=dilated[density][1], dense_steps=dense_steps
            ),
            "random blocks": RandomBlocks(density=density, block=9, dense_steps=dense_steps),
            "random blocks, drawn once": RandomBlocks(
                density=density, block=9, redraw=False, dense_steps=dense_steps
            ),
        }
        rungs += [Rung(family, density, method) for family, method in methods.items()]
    if dense_steps:  # a pattern that is taken from a dense step needs one
        rungs += [
            Rung("SparseD", d, SparseD(select=d, block=9, dense_steps=dense_steps))
            for d in DENSITIES
        ]
    budgets = {0.5: 0.75, 0.25: 0.5, 0.15: 0.3}
    for density, gamma in budgets.items():
        dynamic: dict[str, Method] = {
            "ProxyAttn": ProxyAttn(
                gamma=gamma, block=9, min_budget=9, stride=1, dense_steps=dense_steps
            ),
            "FlexPrefill": FlexPrefill(gamma=gamma, block=9, min_budget=9, dense_steps=dense_steps),
        }
        rungs += [Rung(family, density, method) for family, method in dynamic.items()]
    return rungs


def interval(values: Tensor, *, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of ``values [n]``."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(values), (draws, len(values)), generator=generator)
    means = values.float()[rows].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975])).tolist()
    return low, high


def measure(
    loaded: Loaded,
    clips: int,
    *,
    steps: int = 20,
    warmups: Sequence[float] = (0, 0.25),
    seed: int = HELD_OUT_SEED,
    rungs: Callable[[float], Sequence[Rung]] = ladder,
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Every rung with every number of dense first steps; figures, and some clips of each.

    Args:
        loaded: the embedded video model.
        clips: held-out captions.
        warmups: `dense_steps` of the methods.

    Returns:
        A JSON-ready record, and clips ``[B, 3, T, Y, X]`` of the first captions by label.
    """
    from mmattn.mini.oracle import judge_clips
    from mmattn.mini.scenes import make_clips

    wanted = make_clips(clips, seed)
    captions, seeds = [clip.caption for clip in wanted], list(range(seed, seed + clips))

    def film() -> Tensor:
        return draw(loaded, captions, seeds, steps=steps, batch=16)

    def row(drawn: Tensor, against: Tensor) -> dict[str, Any]:
        verdicts = judge_clips(drawn, wanted)
        figures: dict[str, Any] = {}
        for key in ("all", "colour", "shape", "motion"):
            right = torch.tensor([float(v[key]) for v in verdicts])
            figures[key] = round(float(right.mean()), 4)
            if key == "all":
                figures["all_95"] = [round(x, 4) for x in interval(right)]
        likeness = psnr(drawn, against)
        figures["psnr"] = round(float(likeness.mean()), 3)
        figures["psnr_95"] = [round(x, 3) for x in interval(likeness)]
        figures["ssim"] = round(float(ssim(drawn, against).mean()), 4)
        return figures

    began = time.perf_counter()
    dense = film()
    shown = {"dense": dense[:4]}
    rows = [{"family": "dense", "nominal": 1.0, "density": 1.0, **row(dense, dense)}]
    progress(f"dense: {100 * rows[0]['all']:.0f} %")
    for warmup in warmups:
        for rung in rungs(warmup):
            with attach(loaded.target, rung.method, probe=steps // 2) as session:
                drawn = film()
                stats = session.stats
            values = [v for s in stats.sites for v in s.steps.values() if v < 1]
            found = {
                "family": rung.family,
                "dense_steps": warmup,
                "nominal": rung.density,
                "density": round(stats.density or 1.0, 4),
                "sparse_density": round(sum(values) / max(1, len(values)), 4),
                "recall": round(stats.recall or 0.0, 4),
                **row(drawn, dense),
                "method": rung.method.to_dict(),
            }
            rows.append(found)
            shown[f"{rung.family} {rung.density} {warmup}"] = drawn[:4]
            progress(
                f"{rung.family} {rung.density} from {warmup}: all right {100 * found['all']:.0f} %, "
                f"{found['psnr']:.1f} dB at {found['sparse_density']:.3f}"
            )
    record = {
        "model": loaded.source,
        "clips": clips,
        "steps": steps,
        "seed": seed,
        "seconds": round(time.perf_counter() - began),
        "environment": environment(torch.device("cpu")),
        "rows": rows,
    }
    return record, shown


def markdown(record: dict[str, Any], warmup: float) -> str:
    """The rows with one number of dense first steps as a table."""
    lines = [
        "| method | density (sparse steps) | recall | all right | motion | PSNR, dB | SSIM |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        if row["family"] != "dense" and row["dense_steps"] != warmup:
            continue
        low, high = (100 * x for x in row["all_95"])
        dense = row["family"] == "dense"
        likeness = "" if dense else f"{row['psnr']:.1f}"
        lines.append(
            f"| {row['family']} | {row.get('sparse_density', 1.0):.3f} "
            f"| {row.get('recall', 1.0):.2f} "
            f"| {100 * row['all']:.0f} % ({low:.0f} .. {high:.0f}) | {100 * row['motion']:.0f} % "
            f"| {likeness} | {'' if dense else format(row['ssim'], '.2f')} |"
        )
    return "\n".join(lines) + "\n"


def plot(record: dict[str, Any], path: Path) -> Path:
    """Accuracy and PSNR over density, a panel for each number of dense first steps.

    Raises:
        MissingExtraError: without matplotlib.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError("plots", "matplotlib", "eval") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in record["rows"] if row["family"] != "dense"]
    warmups = sorted({row["dense_steps"] for row in rows})
    families = list(dict.fromkeys(row["family"] for row in rows))
    # C7 is gray, the colour of the baselines.
    cycle = [f"C{i}" for i in range(10) if i != 7]
    chosen = [f for f in families if "random" not in f]
    colours = {family: cycle[i % len(cycle)] for i, family in enumerate(chosen)}
    figure, axes = plt.subplots(
        2, len(warmups), figsize=(5.2 * len(warmups), 7.4), sharex=True, sharey="row", squeeze=False
    )
    for column, warmup in enumerate(warmups):
        for number, family in enumerate(families):
            own = sorted(
                (r for r in rows if r["family"] == family and r["dense_steps"] == warmup),
                key=lambda r: r["sparse_density"],
            )
            if not own:
                continue
            plain = "random" in family
            style = {
                "color": "0.45" if plain else colours[family],
                "linestyle": "--" if plain else "-",
                "marker": "osD^vPX*"[number % 8],
                "label": family,
            }
            x = [r["sparse_density"] for r in own]
            for axis, key, factor in ((axes[0, column], "all", 100), (axes[1, column], "psnr", 1)):
                y = [factor * r[key] for r in own]
                low = [factor * (r[key] - r[f"{key}_95"][0]) for r in own]
                high = [factor * (r[f"{key}_95"][1] - r[key]) for r in own]
                axis.errorbar(x, y, yerr=[low, high], capsize=2, linewidth=1.4, **style)
        share = f"first {100 * warmup:.0f} % of the steps dense" if warmup else "all steps sparse"
        axes[0, column].set_title(share)
        axes[1, column].set_xlabel("density in sparse steps")
    dense = record["rows"][0]
    for axis in axes[0]:
        axis.axhline(100 * dense["all"], color="k", linewidth=0.8, linestyle=":")
    axes[0, 0].set_ylabel("clips with every word right, %")
    axes[1, 0].set_ylabel("PSNR against dense, dB")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    handles, names = axes[1, -1].get_legend_handles_labels()
    figure.legend(handles, names, fontsize=8, loc="lower center", ncols=5)
    figure.suptitle(
        f"Embedded video model, {record['clips']} captions, {record['steps']} steps (95 % intervals)"
    )
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def filmstrip(
    clips: dict[str, Tensor], labels: Sequence[str], path: Path, *, clip: int = 0
) -> Path:
    """Every fourth frame of one caption, a row per label."""
    from PIL import Image, ImageDraw

    scale, left, gap = 2, 170, 4
    rows = []
    for label in labels:
        frames = clips[label][clip, :, ::4].permute(1, 2, 3, 0)
        pixels = (frames.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        rows.append([Image.fromarray(p).resize((p.shape[1] * scale,) * 2, 0) for p in pixels])
    width, height = rows[0][0].size
    sheet = Image.new(
        "RGB", (left + len(rows[0]) * (width + gap), len(rows) * (height + gap)), (222, 222, 222)
    )
    pen = ImageDraw.Draw(sheet)
    for y, (label, strip) in enumerate(zip(labels, rows, strict=True)):
        name = label if label == "dense" else label.rsplit(" ", 2)[0]
        pen.text((6, y * (height + gap) + height // 2 - 6), name, fill="black")
        for x, frame in enumerate(strip):
            sheet.paste(frame, (left + x * (width + gap), y * (height + gap)))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("docs/video"))
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(argv)
    loaded = resolve("t2v")
    loaded.target.set_progress_bar_config(disable=True)
    record, clips = measure(
        loaded,
        options.clips,
        steps=options.steps,
        progress=_say,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "sparsity.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    plot(record, options.out / "sparsity.png")
    labels = ["dense", *(label for label in clips if label.endswith(" 0.25 0"))]
    filmstrip(clips, labels, options.out / "clips.png")
    sys.stdout.write(markdown(record, 0) + "\n" + markdown(record, 0.25))


if __name__ == "__main__":
    main()
