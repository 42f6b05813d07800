"""Plots and tables of `mmattn.evals.agent_curve`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmattn.errors import MissingExtraError

_STYLE = {
    "agents": ("tab:red", "o"),
    "agents, ordinary scale": ("tab:orange", "s"),
    "neighborhood": ("tab:blue", "^"),
    "merged tokens": ("tab:green", "v"),
    "averaged keys": ("tab:gray", "D"),
}
_MODELS = {"t2i": "pictures", "t2v": "clips"}


def plot(records: dict[str, Any], path: Path) -> Path:
    """Shares of right pictures and PSNR over cost, a column per span of steps, two rows per model."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise MissingExtraError("plots", "matplotlib", "eval") from error
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    kinds = [kind for kind in _MODELS if kind in records]
    spans = list(
        dict.fromkeys(r["span"] for r in records[kinds[0]]["rows"].values() if "span" in r)
    )
    figure, axes = plt.subplots(
        2 * len(kinds),
        len(spans),
        figsize=(4.2 * len(spans), 5.2 * len(kinds)),
        sharex="col",
        sharey="row",
        squeeze=False,
    )
    for i, kind in enumerate(kinds):
        for column, span in enumerate(spans):
            for j, (key, factor) in enumerate((("all", 100), ("psnr", 1))):
                axis = axes[2 * i + j, column]
                _curves(axis, records[kind]["rows"], span, key, factor)
                axis.grid(alpha=0.3)
                axis.locator_params(axis="x", nbins=5)
                if column == 0:
                    name = "all right, %" if key == "all" else "PSNR, dB"
                    axis.set_ylabel(f"{_MODELS[kind]}: {name}")
            axes[2 * i, column].axhline(
                100 * records[kind]["rows"]["dense"]["all"], color="k", linewidth=0.8, linestyle=":"
            )
            axes[0, column].set_title(span)
            axes[-1, column].set_xlabel("share of dense multiply-adds, mean over steps")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncols=5, fontsize=9)
    record = records[kinds[0]]
    figure.suptitle(
        f"{record['prompts']} prompts, {record['steps']} steps, 95 % intervals; dotted: dense"
    )
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def _curves(axis: Any, rows: dict[str, Any], span: str, key: str, factor: float) -> None:
    for family, (colour, marker) in _STYLE.items():
        own = [r for r in rows.values() if r["family"] == family and r["span"] == span]
        own.sort(key=lambda r: r["cost"])
        x = [r["cost"] for r in own]
        y = [factor * r[key] for r in own]
        low = [factor * (r[key] - r[f"{key}_95"][0]) for r in own]
        high = [factor * (r[f"{key}_95"][1] - r[key]) for r in own]
        axis.errorbar(
            x, y, yerr=[low, high], color=colour, marker=marker, ms=4, capsize=2, label=family
        )


def markdown(records: dict[str, Any]) -> str:
    """Tables for the documents: every setting, and the times."""
    lines = []
    for kind in (k for k in _MODELS if k in records):
        record = records[kind]
        dense = record["rows"]["dense"]
        lines += [
            f"{_MODELS[kind].capitalize()}; dense: {100 * dense['all']:.0f} % all right.",
            "",
            "| span | family | cost | all right (95 %) | PSNR, dB (95 %) | CPU time against dense |",
            "|---|---|---|---|---|---|",
        ]
        rows = [r for r in record["rows"].values() if "span" in r]
        spans = list(dict.fromkeys(r["span"] for r in rows))
        for r in sorted(rows, key=lambda r: (spans.index(r["span"]), r["family"], -r["cost"])):
            low, high = (100 * x for x in r["all_95"])
            lines.append(
                f"| {r['span']} | {r['family']} | {r['cost']:.2f} | {100 * r['all']:.0f} % "
                f"({low:.0f} .. {high:.0f}) | {r['psnr']:.1f} ({r['psnr_95'][0]:.1f} .. "
                f"{r['psnr_95'][1]:.1f}) | {r['cpu_seconds'] / dense['cpu_seconds']:.2f} |"
            )
        lines.append("")
        if "times" in record:
            lines += ["| tokens | family | cost | ms in attention |", "|---|---|---|---|"]
            lines += [
                f"| {t['tokens']} | {t['family']} | {t['cost']:.2f} | {t['milliseconds']:.1f} |"
                for t in record["times"]
            ]
            lines.append("")
    return "\n".join(lines) + "\n"


def strip(pictures: dict[str, Tensor], path: Path) -> Path:
    """A row of pictures ``[B, 3, Y, X]`` per label."""
    from PIL import Image, ImageDraw

    left, gap, side = 290, 4, 96
    columns = len(next(iter(pictures.values())))
    size = (left + columns * (side + gap), len(pictures) * (side + gap))
    sheet = Image.new("RGB", size, (222, 222, 222))
    pen = ImageDraw.Draw(sheet)
    for y, (label, row) in enumerate(pictures.items()):
        pen.text((6, y * (side + gap) + side // 2 - 6), label, fill="black")
        for x, picture in enumerate(row):
            pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            tile = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(tile, (left + x * (side + gap), y * (side + gap)))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path
