"""CPU time of vision-language methods per answer on the embedded model, prefill and decoding apart.

    OMP_NUM_THREADS=1 python pipelines/bench/vlm_times.py

64 captions in one batch, greedy, one thread. Time is that of the process and not of the clock, so that other
work on the machine counts little; every column is measured in turn, several times over, and its least time
stands. Prefill is a call that ends at its first token. Answers have other lengths under other methods, so
decoding is given per token as well.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torchvision.transforms.functional import to_pil_image

import mmattn
from mmattn.calls import answer
from mmattn.loading import Loaded, resolve
from mmattn.mini import objects
from mmattn.variants import Variant, parse

COLUMNS = (
    "vcd",
    "dola",
    "dola:layers=high",
    "image-guidance",
    "largepig",
    "vhr",
    "opera",
    "var:dims=[37,101],tau=3.0",
    "act",
    "zerotuning",
    "pai:alpha=0.6",
    "paint",
    "vasparse",
    "hiprune:keep=21",
    "merge-prune:keep=21",
    "visionzip:keep=21",
    "fastv:keep=0.333",
    "pyramiddrop",
)


def spent(
    loaded: Loaded, pictures: Sequence[Any], column: Variant | None, words: int
) -> tuple[float, int]:
    """CPU seconds of answering at most `words` tokens for every picture, and words of the longest answer."""
    prompts = [objects.CAPTION_PROMPT] * len(pictures)
    attached = (
        nullcontext() if column is None else mmattn.attach(loaded.target, list(column.methods))
    )
    with attached:
        start = time.process_time()
        texts = answer(loaded, pictures, prompts, max_new_tokens=words, batch=len(pictures))
        took = time.process_time() - start
    return took, max(len(text.split()) for text in texts)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-m", dest="methods", action="append")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    loaded = resolve("vlm")
    scenes = objects.sample_scenes(args.captions, torch.Generator().manual_seed(31), 0.2)
    pictures = [to_pil_image(picture) for picture in objects.render(scenes)[0]]
    columns: list[Variant | None] = [None, *(parse(text) for text in args.methods or COLUMNS)]
    best: dict[int, list[float]] = {i: [1e9, 1e9, 0] for i in range(len(columns))}
    for _ in range(args.rounds):
        for i, column in enumerate(columns):
            first, _ = spent(loaded, pictures, column, 1)
            whole, longest = spent(loaded, pictures, column, 96)
            best[i] = [min(best[i][0], first), min(best[i][1], whole), longest]
    lines = ["| method | prefill ms | decoding ms | longest answer | decoding, us per token |"]
    lines.append("|---|---|---|---|---|")
    for i, column in enumerate(columns):
        first, whole, longest = best[i]
        per = 1e3 / args.captions
        name = "dense" if column is None else column.label
        decoding = (whole - first) * per
        cells = [name, f"{first * per:.2f}", f"{decoding:.2f}", f"{longest:.0f}"]
        lines.append(f"| {' | '.join(cells)} | {1e3 * decoding / longest:.0f} |")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
