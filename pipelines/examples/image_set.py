"""Draw a set of related pictures, as panels of one canvas or as a group, and save each of them.

    python pipelines/examples/image_set.py --out out/set \
        "a red circle on a white background" "a red circle on a white background"
    python pipelines/examples/image_set.py --reference out/set/1.png --out out/more \
        "a red circle on a white background" "a red circle on a white background"
    python pipelines/examples/image_set.py --how canvas --model path/to/FLUX.1-dev --lora film.safetensors \
        --height 512 --width 1024 --dtype bfloat16 --device cuda --tag MOVIE-SHOTS \
        --overall "a day of <Mira> in the rain" "<Mira> at a window" "<Mira> in a bus" "<Mira> at sea"

With ``--how group`` pictures have a caption each and look at each other's images; this is what the embedded
model can do. With ``--how canvas`` they are panels under one caption, as In-Context LoRAs are trained.
References are the first pictures of the set and are described as well.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmattn_pipelines.captions import SetCaption
from mmattn_pipelines.in_context import InContextOutput, InContextPipeline
from mmattn_pipelines.panels import PanelLayout
from PIL import Image

from mmattn.calls import T2I_SIZE, TEXT_LENGTH
from mmattn.loading import resolve


def draw(args: argparse.Namespace) -> InContextOutput:
    """The set that the command line asks for."""
    loaded = resolve(args.model, "t2i", device=args.device, dtype=getattr(torch, args.dtype))
    if args.lora is not None:
        loaded.target.load_lora_weights(args.lora)
    pipe = InContextPipeline(loaded.target)
    size = (args.height or T2I_SIZE, args.width or T2I_SIZE)
    settings: dict[str, Any] = {
        "references": [Image.open(path) for path in args.reference],
        "num_inference_steps": args.steps,
        "generator": torch.Generator(args.device).manual_seed(args.seed),
    }
    if (
        loaded.embedded
    ):  # needs guidance away from the empty prompt, and the text length of training
        settings |= {"negative_prompt": "", "true_cfg_scale": 3.0}
        settings["max_sequence_length"] = TEXT_LENGTH
    if args.visibility:
        settings["visibility"] = args.visibility
    if args.how == "group":
        output = pipe.group(args.captions, size=size, **settings)
    else:
        layout = PanelLayout.auto(len(args.captions), *size)
        caption = SetCaption.for_layout(layout, args.tag, args.overall, args.captions)
        output = pipe(caption, layout=layout, lora_scale=args.lora_scale, **settings)
    assert isinstance(output, InContextOutput)
    return output


def main(argv: Sequence[str] | None = None) -> int:
    """Draw and save the pictures as 1.png, 2.png and so on."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("captions", nargs="+", help="what each picture of the set shows")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--how", choices=("group", "canvas"), default="group")
    parser.add_argument("--reference", type=Path, action="append", default=[])
    parser.add_argument("--visibility", help="full, group, isolated or reference-blocked")
    parser.add_argument("--tag", default="IMAGE-SET", help="task of the caption (canvas)")
    parser.add_argument("--overall", default="", help="what all panels share (canvas)")
    parser.add_argument("--model", default="t2i", help="t2i (embedded), a folder or a hub id")
    parser.add_argument("--lora", help="file or hub id of an In-Context LoRA")
    parser.add_argument("--lora-scale", type=float)
    parser.add_argument("--height", type=int, help="of one picture, in pixels")
    parser.add_argument("--width", type=int)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args(argv)
    output = draw(args)
    args.out.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(output.images, 1):
        picture.save(args.out / f"{number}.png")
    if output.canvas is not None:
        output.canvas.save(args.out / "canvas.png")
    if output.report is not None:
        sys.stdout.write(f"attention kept {output.report.density:.0%} of the pairs of tokens\n")
    sys.stdout.write(f"{len(output.images)} pictures are in {args.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
