"""Write an illustrated article: Markdown and pictures, from one message.

    python pipelines/examples/illustrated_article.py --out out/article
    python pipelines/examples/illustrated_article.py --out out/fox --model path/to/FLUX.1-dev --device cuda \
        --dtype bfloat16 --steps 28 --language-model NAME --message "A picture book about a fox in winter"

The embedded model knows coloured shapes; other models draw what they are asked. Without --language-model
the message is planned by rules, which invent nothing: list the pictures behind a colon. With it, a server
that speaks the OpenAI protocol plans and writes; --key-variable names the environment variable of its key.

The conversation is kept in OUT/conversation after every canvas. Called again with the same --out, the script
goes on with an article that was interrupted, or adds another one, which may refer to earlier pictures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmattn_pipelines.chatdit import ChatDiT
from mmattn_pipelines.chatdit_planners import OpenAIPlanner, RulePlanner
from mmattn_pipelines.chatdit_scenes import EMBEDDED_PANEL, embedded
from mmattn_pipelines.in_context import InContextPipeline

from mmattn.loading import resolve

MESSAGE = (
    "Write an illustrated article about a yellow star on a black background: big in the center; small on the "
    "left; small on the right; small on the top; small on the bottom; big, purple"
)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of article and pictures")
    parser.add_argument("--message", default=MESSAGE, help="what the article is about")
    parser.add_argument("--model", default="t2i", help="t2i (embedded) or a folder of a pipeline")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--language-model", help="plan with this model of an OpenAI-like server")
    parser.add_argument("--base-url", default="https://api.openai.com/v1")
    parser.add_argument("--key-variable", default="OPENAI_API_KEY", help="empty: send no key")
    return parser.parse_args(argv)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What `ChatDiT` and `ChatDiT.load` take."""
    if args.model == "t2i":
        found = embedded(args.steps)
    else:
        loaded = resolve(args.model, "t2i", device=args.device, dtype=getattr(torch, args.dtype))
        options = {"num_inference_steps": args.steps}
        found = {"generator": InContextPipeline(loaded.target), "options": options}
        found["planner"] = RulePlanner()
    if args.language_model:
        found["planner"] = OpenAIPlanner(
            args.language_model, args.base_url, key_variable=args.key_variable or None
        )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Draw, write, export."""
    args = arguments(argv)
    folder = args.out / "conversation"
    if (folder / "conversation.json").is_file():
        chat = ChatDiT.load(folder, **settings(args))
    else:
        panel = EMBEDDED_PANEL if args.model == "t2i" else None
        chat = ChatDiT(folder=folder, panel=panel, seed=args.seed, **settings(args))
    last = chat.rounds[-1] if chat.rounds else None
    if last is not None and not last.complete and last.text == args.message:
        article = chat.resume().article
    else:
        article = chat.article(args.message)
    if article is not None:
        path = article.export(args.out / f"article-{chat.rounds[-1].number}")
        sys.stderr.write(f"{path} shows {len(article.pictures)} pictures\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
