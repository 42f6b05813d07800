"""The vision-language model: tokens kept, attention moved, words that changed."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from methods._figures.probe import BLUE, GREY, RED, Seen, bare, made, model, save, show, watched
from methods._figures.scenes import (
    SHOWN,
    captions,
    images,
    inputs,
    invented,
    next_words,
    scenes,
    untouched,
)
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

import mmattn

PATCH = 8


def _picture(scene: int) -> Tensor:
    return pil_to_tensor(images()[scene]).float() / 255


def _veiled(scene: int, keep: Tensor) -> Tensor:
    """The picture with a blue-grey veil over dropped patches."""
    picture = _picture(scene)
    side = picture.shape[-1] // PATCH
    mask = keep.view(side, side).float()
    mask = mask.repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)
    veil = torch.tensor([0.76, 0.81, 0.88]).view(3, 1, 1)
    return picture * mask + (0.1 * picture + 0.9 * veil) * (1 - mask)


def kept(use: str, path: Path) -> None:
    """Four scenes, and what is left of them; orange frames are tokens that took others in."""
    method = made(use)
    log: list[tuple[Tensor, Tensor]] = []
    base = type(method)

    class Watched(base):  # type: ignore[misc, valid-type]
        def features(self, tile: Any, *, site: Any) -> Any:
            out = base.features(self, tile, site=site)
            indices = out.indices if hasattr(out, "indices") and not callable(out.indices) else out
            keep = torch.zeros(len(tile.features), dtype=torch.bool)
            keep[indices] = True
            changed = torch.zeros_like(keep)
            if indices is not out:
                changed[indices] = (out.features != tile.features[indices]).any(1)
            log.append((keep, changed))
            return out

    copy = Watched(**{k: v for k, v in method.to_dict().items() if k != "name"})
    chosen = (SHOWN, 2, 7, 12)
    figure, axes = plt.subplots(2, len(chosen), figsize=(5.6, 3.0), layout="constrained")
    with mmattn.attach(model("vlm").target, copy):
        for scene in chosen:
            model("vlm").target.generate(**inputs(scene), max_new_tokens=1)
    for column, (scene, (keep, changed)) in enumerate(zip(chosen, log, strict=True)):
        show(axes[0][column], _picture(scene))
        show(axes[1][column], _veiled(scene, keep), f"{int(keep.sum())} of {len(keep)} tokens")
        side = int(len(keep) ** 0.5)
        for token in changed.nonzero().flatten().tolist():
            corner = (token % side * PATCH - 0.5, token // side * PATCH - 0.5)
            axes[1][column].add_patch(
                plt.Rectangle(corner, PATCH, PATCH, fill=False, ec="#e08a1e", lw=1.2)
            )
    axes[0][0].set_ylabel("picture")
    axes[1][0].set_ylabel(method.name)
    save(figure, path, colours=160)


def stages(use: str, path: Path) -> None:
    """One prompt: the image tokens that each stage of the decoder still attends to."""
    log: list[Seen] = []
    target = model("vlm").target
    with mmattn.attach(target, watched(made(use), lambda site: True, log)):
        target.generate(**inputs(SHOWN), max_new_tokens=1)
    image = inputs(SHOWN)["input_ids"][0] == target.config.image_token_id
    seen = {one.layer: (one.method[:, -1] > 0).any(0)[image] for one in log if one.past == 0}
    runs: list[tuple[int, Tensor]] = [(0, torch.ones(int(image.sum()), dtype=torch.bool))]
    for layer in sorted(seen):
        if not torch.equal(seen[layer], runs[-1][1]):
            runs.append((layer, seen[layer]))
    panels = len(runs) + 1
    figure, axes = plt.subplots(1, panels, figsize=(1.5 * panels, 1.8), layout="constrained")
    show(axes[0], _picture(SHOWN), "picture")
    for i, (axis, (first, keep)) in enumerate(zip(axes[1:], runs, strict=True)):
        last = runs[i + 1][0] if i + 1 < len(runs) else target.config.text_config.num_hidden_layers
        blocks = f"block {last}" if first + 1 == last else f"blocks {first + 1} to {last}"
        show(axis, _veiled(SHOWN, keep), f"{blocks}: {int(keep.sum())} tokens")
    save(figure, path)


def shares(use: str, path: Path) -> None:
    """Where a written word's attention goes, on the same queries and keys, before and after."""
    log: list[Seen] = []
    target, ids = model("vlm").target, inputs(SHOWN)
    image = ids["input_ids"][0] == target.config.image_token_id

    with mmattn.attach(target, watched(made(use), lambda site: "language_model" in site.path, log)):
        target.generate(**ids, max_new_tokens=40, do_sample=False)
    prompt = len(image)
    parts = []
    maps = []
    for one in log:
        if one.past < prompt or one.method.shape[1] != 1:
            continue
        rows = torch.stack([one.dense[:, 0].float().mean(0), one.method[:, 0].float().mean(0)])
        on_image = rows[:, :prompt][:, image]
        maps.append(on_image)
        parts.append(
            torch.stack(
                [
                    rows[:, 0],
                    on_image.sum(1),
                    rows[:, 1:prompt].sum(1) - on_image.sum(1),
                    rows[:, prompt:].sum(1),
                ],
                1,
            )
        )
    mean, heat = torch.stack(parts).mean(0), torch.stack(maps).mean(0)
    figure, axes = plt.subplots(
        1, 4, figsize=(8.2, 1.75), width_ratios=[1, 1, 1, 2.4], layout="constrained"
    )
    show(axes[0], _picture(SHOWN), "picture")
    side = int(heat.shape[1] ** 0.5)
    top = float(heat.max())
    for axis, values, title in zip(axes[1:3], heat, ("before", "after"), strict=True):
        show(
            axis,
            values.view(side, side),
            f"on the image, {title}",
            cmap="viridis",
            vmin=0,
            vmax=top,
        )
    left = torch.zeros(2)
    names = ("first token", "image", "other prompt", "own words")
    for name, colour, values in zip(names, (RED, BLUE, GREY, "#dfdfdf"), mean.T, strict=True):
        axes[3].barh([1, 0], values, left=left, color=colour, label=name)
        for y, value, at in zip((1, 0), values.tolist(), left.tolist(), strict=True):
            if value > 0.06:
                axes[3].text(at + value / 2, y, f"{100 * value:.1f}", ha="center", va="center")
        left = left + values
    axes[3].set_yticks([1, 0], ["before", "after"])
    axes[3].set_xticks([])
    axes[3].set_xlim(0, 1)
    axes[3].spines[:].set_visible(False)
    axes[3].legend(
        ncols=4,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.02),
        frameon=False,
        fontsize=7,
        columnspacing=0.8,
        handlelength=1,
    )
    axes[3].set_title("attention of a written word, % (changed blocks and heads, mean)", pad=3)
    save(figure, path)


def words(use: str, path: Path) -> None:
    """The first of 24 captions that changed, and the choice where it changed."""
    method = made(use)
    with mmattn.attach(model("vlm").target, method):
        said = captions()
    different = [i for i, text in enumerate(said) if text != untouched()[i]]
    if not different:
        raise SystemExit(f"{use} changes none of the captions; choose another figure")
    scene = SHOWN if SHOWN in different else different[0]
    texts = (untouched()[scene], said[scene])
    encode = model("vlm").processor.tokenizer
    ids = [encode(text, add_special_tokens=False)["input_ids"] for text in texts]
    ids = [[*row, encode.eos_token_id] for row in ids]
    at = next(i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b)
    chances = [next_words(scene, ids[0][:at], m) for m in (None, method)]
    figure, axes = plt.subplots(
        1, 3, figsize=(8.4, 2.1), width_ratios=[1, 2.2, 1.3], layout="constrained"
    )
    show(axes[0], _picture(scene), "picture")
    wrongs = [sum(len(invented(t, i)) for i, t in enumerate(all_)) for all_ in (untouched(), said)]
    _texts(axes[1], ("untouched", method.name), texts, scene)
    axes[1].set_title(
        f"{len(different)} of 24 captions changed; invented objects {wrongs[0]} -> {wrongs[1]}",
        pad=3,
    )
    best = torch.stack(chances).amax(0).topk(5).indices
    labels = [encode.decode([int(i)]) or "end" for i in best]
    for offset, row, colour in ((0.2, 0, GREY), (-0.2, 1, BLUE)):
        place = [len(best) - 1 - i + offset for i in range(len(best))]
        label = ("untouched", method.name)[row]
        axes[2].barh(place, chances[row][best], height=0.38, color=colour, label=label)
    axes[2].set_yticks(range(len(best) - 1, -1, -1), labels)
    axes[2].set_xlim(0, 1)
    axes[2].set_xticks([0, 0.5, 1])
    axes[2].legend(frameon=False, fontsize=7, loc="lower right")
    before = encode.decode(ids[0][max(0, at - 3) : at])
    axes[2].set_title(f"next word after “... {before}”", pad=3)
    axes[2].spines[["top", "right"]].set_visible(False)
    save(figure, path)


def _texts(axis: Any, labels: tuple[str, ...], texts: tuple[str, ...], scene: int) -> None:
    """Two captions, one word after the other, what is invented in red."""
    bare(axis).axis("off")
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
    y = 0.93
    for label, text in zip(labels, texts, strict=True):
        axis.text(0, y, label, fontsize=7, weight="bold", va="center")
        y -= 0.105
        wrong = invented(text, scene)
        for line in textwrap.wrap(text, 62):
            x = 0.0
            for word in line.split():
                axis.text(
                    x,
                    y,
                    word,
                    fontsize=6.5,
                    va="center",
                    family="monospace",
                    color=RED if word in wrong else "black",
                    weight="bold" if word in wrong else "normal",
                )
                x += (len(word) + 1) / 63
            y -= 0.095
        y -= 0.03


def heads(use: str, path: Path) -> None:
    """Which heads were reinforced, block by block, and what the caption became."""
    method = made(use)
    target = model("vlm").target
    with mmattn.attach(target, method):
        said = captions()
    with mmattn.attach(target, method) as session:
        target.generate(**inputs(SHOWN), max_new_tokens=1)
        sites = [s for run in session.runs for s in run.sites if "language_model" in s.path]
        rows = [
            s.run.states_of(s, 0).get((0, 0), {}).get("factor") if s.run is not None else None
            for s in sites
        ]
    count = next(row.shape[1] for row in rows if row is not None)
    table = torch.stack(
        [torch.ones(count) if row is None else row[0].flatten().float() for row in rows]
    )
    figure, axes = plt.subplots(
        1, 3, figsize=(8.4, 2.1), width_ratios=[1, 2.2, 1.3], layout="constrained"
    )
    show(axes[0], _picture(SHOWN), "picture")
    wrongs = [sum(len(invented(t, i)) for i, t in enumerate(all_)) for all_ in (untouched(), said)]
    different = sum(a != b for a, b in zip(said, untouched(), strict=True))
    _texts(axes[1], ("untouched", method.name), (untouched()[SHOWN], said[SHOWN]), SHOWN)
    axes[1].set_title(
        f"{different} of {len(scenes())} captions changed; invented objects {wrongs[0]} -> {wrongs[1]}",
        pad=3,
    )
    axes[2].imshow(table, cmap="Blues", vmin=0.5, vmax=2.4, aspect="auto")
    axes[2].set_xticks(range(count), [str(i) for i in range(count)])
    blocks = [re.search(r"layers\.(\d+)", s.path) for s in sites]
    axes[2].set_yticks(range(len(rows)), [str(int(b[1]) + 1) for b in blocks if b is not None])
    axes[2].set_xlabel("head")
    axes[2].set_ylabel("block")
    axes[2].set_title("dark: reinforced for this picture", pad=3)
    save(figure, path)


def trust(use: str, path: Path) -> None:
    """OPERA's score of every word of a caption, once the caption is complete."""
    method = made(use)
    base = type(method)
    found: list[Tensor] = []

    class Watched(base):  # type: ignore[misc, valid-type]
        def _trust(self, call: Any, site: Any, looks: Tensor) -> Any:
            known = base._trust(self, call, site, looks)
            found.append(known.sums[0].clone())
            return known

    copy = Watched(**{k: v for k, v in method.to_dict().items() if k != "name"})
    vlm, ids = model("vlm"), inputs(SHOWN)
    with mmattn.attach(vlm.target, copy):
        out = vlm.target.generate(**ids, max_new_tokens=64, do_sample=False)
    said = out[0, ids["input_ids"].shape[1] :]
    words_ = [vlm.processor.tokenizer.decode([int(i)]) for i in said]
    powers = (found[-1] / torch.log(torch.tensor(10.0)) - 7).tolist()
    figure, axes = plt.subplots(
        1, 2, figsize=(8.4, 2.1), width_ratios=[1, 4.4], layout="constrained"
    )
    show(axes[0], _picture(SHOWN), "picture")
    axes[1].bar(range(len(powers)), powers, color=BLUE)
    axes[1].set_xticks(range(len(powers)), words_[: len(powers)], rotation=90, fontsize=7)
    axes[1].set_ylabel("score, power of ten")
    axes[1].spines[["top", "right"]].set_visible(False)
    save(figure, path)
