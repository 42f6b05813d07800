"""Draw one MP4 per prompt with sparse attention; what was interrupted goes on where it stopped.

    python pipelines/examples/long_video_batch.py --prompts prompts.txt --out out/clips
    python pipelines/examples/long_video_batch.py --model path/to/Wan2.1-T2V-1.3B-Diffusers \
        --prompts prompts.jsonl --height 480 --width 832 --num-frames 81 --dtype bfloat16 --device cuda

Prompts are the lines of a text file, or objects with "prompt" and optionally "id", "seed" and "negative" in
a JSONL file. Every finished item adds a line to manifest.jsonl. Exit code: 0, or 3 if some items failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from mmattn_pipelines.wan_sparse import WanSparsePipeline
from tqdm import tqdm

import mmattn
from mmattn.batch.writers import write_video
from mmattn.calls import T2V_FRAMES, T2V_SIZE, TEXT_LENGTH
from mmattn.loading import resolve
from mmattn.variants import parse

SIZE = {"height": T2V_SIZE, "width": T2V_SIZE, "num_frames": T2V_FRAMES}
SIZE["max_sequence_length"] = TEXT_LENGTH  # what the embedded model needs; others know their own


def read_items(path: Path, base: int, negative: str) -> Iterator[dict[str, Any]]:
    """Items with id, prompt, negative prompt and seed; a line that cannot be used has "error" instead.

    Name and seed follow from the prompt and from how often it came before, not from the line number, so
    lines may be moved, added and removed between runs.
    """
    seen: Counter[str] = Counter()
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    for number, line in ((number, line) for number, line in lines if line.strip()):
        try:
            item = dict(json.loads(line)) if path.suffix == ".jsonl" else {"prompt": line.strip()}
            prompt = item["prompt"].strip()
            check = zlib.crc32(f"{prompt}#{seen[prompt]}".encode())
            words = f"{prompt.lower()[:40]}-{check:08x}"
            name = re.sub(r"[^\w.]+", "-", str(item.get("id", words))).strip("-.")
            seed = int(item.get("seed", (base * 1_000_003 + check) % 2**31))
            if not prompt or not name or f"id {name}" in seen:
                raise ValueError("the prompt or its id is empty, or the id was used before")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            yield {"id": f"line-{number:05d}", "error": f"{type(error).__name__}: {error}"}
            continue
        seen.update([prompt, f"id {name}"])
        item.setdefault("negative", negative)
        yield {"id": name, "seed": seed, "prompt": prompt, "negative": item["negative"]}


def read_manifest(manifest: Path) -> dict[str, dict[str, Any]]:
    """The last line of every id."""
    rows: dict[str, dict[str, Any]] = {}
    for line in manifest.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):  # a killed run may leave half a line
            rows |= {(row := json.loads(line))["id"]: row}
    return rows


def append(manifest: Path, row: dict[str, Any]) -> None:
    """Add a line, after ending one that a killed run left open."""
    with manifest.open("a+b") as stream:
        if stream.tell():
            stream.seek(-1, 2)
            stream.write(b"" if stream.read(1) == b"\n" else b"\n")
        stream.write((json.dumps(row, ensure_ascii=False, default=str) + "\n").encode())


def film(pipe: WanSparsePipeline, item: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Draw and write one item; its part of the manifest line."""
    began, embedded = time.perf_counter(), args.model == "t2v"
    result = pipe(
        item["prompt"],
        negative_prompt=item["negative"],
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        generator=torch.Generator().manual_seed(item["seed"]),
        output_type="pt",
        sparse=args.method,
        **{n: size for n in SIZE if (size := getattr(args, n) or embedded * SIZE[n])},
    )
    facts = {"seconds": round(time.perf_counter() - began, 3)}
    facts["density"] = None if result.sparsity is None else result.sparsity.density
    meta = {**item, "steps": args.steps, "method": args.sparse, **facts}
    path, frames = args.out / f"{item['id']}.mp4", list(result.frames[0])
    return {**facts, "file": write_video(path, frames, fps=args.fps, meta=meta).name, "ok": True}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with the method that `--sparse` names as ``method``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--prompts", type=Path, required=True, help=".txt or .jsonl file")
    parser.add_argument("--out", type=Path, required=True, help="folder of the clips")
    parser.add_argument("--model", default="t2v", help="t2v (embedded) or a folder of Wan")
    parser.add_argument("--sparse", default="auto", help="auto, none, recipe file, or vmoba:topk=3")
    plain = {"steps": 20, "guidance": 3.0, "negative": "", "seed": 0, "fps": 8, "device": "cpu"}
    for name, default in {**plain, "dtype": "float32", **dict.fromkeys(SIZE, 0)}.items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=default)
    args = parser.parse_args(argv)
    args.method = {"auto": "auto", "none": None}.get(args.sparse, ())
    if args.method == ():
        is_file = args.sparse.endswith((".toml", ".json"))
        args.method = mmattn.load(args.sparse) if is_file else list(parse(args.sparse).methods)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Draw what is missing; 0, or 3 if some items failed."""
    args = arguments(argv)
    apart = ("prompts", "out", "method", "device", "seed", "negative")  # or in every item's line
    settings = {name: value for name, value in vars(args).items() if name not in apart}
    loaded = resolve(args.model, "t2v", device=args.device, dtype=getattr(torch, args.dtype))
    pipe = WanSparsePipeline.from_pipe(loaded.target)
    pipe.set_progress_bar_config(disable=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (manifest := args.out / "manifest.jsonl").touch()
    done, items = read_manifest(manifest), list(read_items(args.prompts, args.seed, args.negative))
    failed = 0
    for item in tqdm(items, unit="clip", file=sys.stderr):
        row, old = {**item, "settings": settings}, done.get(item["id"], {})
        if old.get("ok") and row.items() <= old.items() and (args.out / old["file"]).is_file():
            continue
        try:
            row |= {"ok": False} if "error" in item else film(pipe, item, args)
        except Exception as error:
            row |= {"ok": False, "error": f"{type(error).__name__}: {error}"}
        failed += not row["ok"]
        append(manifest, row)
    tqdm.write(f"{len(items) - failed} of {len(items)} clips are in {args.out}", file=sys.stderr)
    return 3 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
