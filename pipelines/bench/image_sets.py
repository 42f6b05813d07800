"""What a given picture does to a set, on the embedded model: a group, a canvas, and each on its own.

    python pipelines/bench/image_sets.py --write      # 24 scenes: results/image_sets.json and the picture
    python pipelines/bench/image_sets.py --scenes 2

Every scene is given as a drawn picture whose caption leaves the place of its object open; a second picture
with the same caption is drawn. If it has looked at the given one, its object is in the same place. An
oracle that measures pixels says where the object is and whether it is right. Also: the time of attention
for eight isolated panels of 1024 tokens, printed only if its output equals masked attention.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from mmattn_pipelines.in_context import InContextPipeline
from mmattn_pipelines.panels import PanelLayout
from PIL import Image

import mmattn.mini
from mmattn.calls import T2I_SIZE, TEXT_LENGTH
from mmattn.measuring import environment
from mmattn.methods.panel_attention import PanelAttention, Parts, plan_calls
from mmattn.mini.oracle import look
from mmattn.mini.scenes import Scene, draw_scenes, make_scenes

RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).parents[2] / "docs" / "in-context" / "sets.png"
SIZE = (T2I_SIZE, T2I_SIZE)
COMMON: dict[str, Any] = {
    "num_inference_steps": 20,
    "negative_prompt": "",
    "true_cfg_scale": 3.0,
    "max_sequence_length": TEXT_LENGTH,
}


def picture_of(scene: Scene) -> Image.Image:
    """The scene as it is drawn."""
    pixels = (draw_scenes([scene])[0] * 255).round().byte().permute(1, 2, 0)
    return Image.fromarray(pixels.contiguous().numpy())


def beside(
    pipe: InContextPipeline, scene: Scene, how: str, seed: int, members: int = 2
) -> list[torch.Tensor]:
    """The pictures that are drawn beside a given one, each ``[3, Y, X]``."""
    kind, visibility = how.split()
    arguments: dict[str, Any] = {
        "references": [picture_of(scene)],
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "pt",
        **COMMON,
    }
    captions = [scene.caption] * members
    if kind == "batch":
        out = pipe.group(captions, size=SIZE, visibility=visibility, **arguments)
    else:
        layout = PanelLayout(1, members, *SIZE)
        out = pipe(captions, layout=layout, visibility=visibility, **arguments)
    return [picture.float() for picture in out.images[1:]]


def judge(picture: torch.Tensor, scene: Scene) -> tuple[float | None, bool]:
    """How far the object is from where it was given (None: nothing drawn), and whether it is right."""
    sight, thing = look(picture[None])[0], scene.things[0]
    if not sight.things:
        return None, False
    found = sight.things[0]
    right = (found.shape, found.colour) == (thing.shape, thing.colour)
    away = ((found.cx - thing.cx) ** 2 + (found.cy - thing.cy) ** 2) ** 0.5
    return away, right and sight.background == scene.background


def timing(
    panels: int = 8, tokens: int = 1024, heads: int = 4, head_dim: int = 64
) -> dict[str, float]:
    """Seconds of one attention call over a canvas: dense, masked, and panel by panel."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, heads, panels * tokens, head_dim)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    owner = torch.arange(panels * tokens) // tokens
    mask = (owner[:, None] == owner)[None, None]
    places = torch.arange(panels * tokens).chunk(panels)
    calls = plan_calls(PanelAttention(cols=panels).sees, Parts(places, (), False, False))

    def apart() -> torch.Tensor:
        out = torch.empty_like(q)
        for rows, keys in calls:
            out[:, :, rows] = F.scaled_dot_product_attention(
                q[:, :, rows], k[:, :, keys], v[:, :, keys]
            )
        return out

    runs = {
        "dense": lambda: F.scaled_dot_product_attention(q, k, v),
        "masked": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
        "panel by panel": apart,
    }
    if not torch.allclose(runs["masked"](), apart(), atol=1e-5):
        raise SystemExit("panel by panel differs from masked attention; no time is reported")
    found = {}
    for name, run in runs.items():
        times = []
        for _ in range(4):
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
        found[name] = min(times)
    return found


def sheet(scenes: Sequence[Scene], apart: Any, together: Any) -> Image.Image:
    """A row per scene: the given picture, three drawn each on its own, three drawn as a group."""
    side, gap, between = T2I_SIZE, 4, 16
    width = 7 * side + 4 * gap + 2 * between
    whole = Image.new("RGB", (width, len(scenes) * (side + gap) - gap), "#999999")
    for y, scene in enumerate(scenes):
        place = (0, y * (side + gap))
        whole.paste(picture_of(scene), place)
        for block, drawn in enumerate((apart[y], together[y])):
            for x, picture in enumerate(drawn):
                left = side + between + block * (3 * side + 2 * gap + between) + x * (side + gap)
                pixels = (picture * 255).round().byte().permute(1, 2, 0).contiguous()
                whole.paste(Image.fromarray(pixels.numpy()), (left, place[1]))
    return whole.resize((2 * width, 2 * whole.height))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and with ``--write`` keep numbers and picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--scenes", type=int, default=24)
    parser.add_argument("--write", action="store_true", help="keep the numbers and the picture")
    args = parser.parse_args(argv)
    pipe = InContextPipeline(mmattn.mini.load("t2i"))
    pipe.pipe.set_progress_bar_config(disable=True)
    drawn = make_scenes(20 * args.scenes + 20, 41, mix=[("one", 1.0)])
    scenes = [scene for scene in drawn if scene.position is None][: args.scenes]
    table, drawn_sets = {}, {}
    rows = [
        (how, 2) for how in ("batch isolated", "batch group", "canvas isolated", "canvas group")
    ]
    for how, members in [*rows, ("batch isolated", 4), ("batch group", 4)]:
        sets = [beside(pipe, s, how, seed, members) for seed, s in enumerate(scenes)]
        judged = [judge(p, s) for drawn_set, s in zip(sets, scenes, strict=True) for p in drawn_set]
        how = f"{how} {members}"
        drawn_sets[how] = sets
        away = [distance for distance, _ in judged if distance is not None]
        table[how] = {
            "distance": round(mean(away), 2) if away else None,
            "median": round(median(away), 2) if away else None,
            "right": round(mean(right for _, right in judged), 3),
            "pictures": len(judged),
            "nothing": len(judged) - len(away),
        }
        sys.stdout.write(f"{how:<18} {table[how]}\n")
    seconds = {name: round(value, 3) for name, value in timing().items()}
    sys.stdout.write(f"{'attention':<18} {seconds}\n")
    if args.write:
        record = {"scenes": len(scenes), "table": table, "attention_seconds": seconds}
        record["environment"] = environment(torch.device("cpu"))
        (RESULTS / "image_sets.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        PICTURE.parent.mkdir(exist_ok=True)
        sets = (drawn_sets[f"batch {how} 4"] for how in ("isolated", "group"))
        sheet(scenes[:6], *sets).save(PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
