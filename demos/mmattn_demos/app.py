"""All demos as tabs of one page."""

from __future__ import annotations

from typing import Any

from mmattn_demos import bench, image, imagesets, parts, tokens, video, vlm
from mmattn_demos.models import Models

TABS = (
    ("Image", image),
    ("Video", video),
    ("Image sets", imagesets),
    ("VLM", vlm),
    ("Tokens & attention", tokens),
    ("Bench", bench),
)


def build(models: Models | None = None) -> Any:
    """The whole page."""
    ctx = parts.context(models)
    with parts.page(ctx, "mmattn") as demo:
        ctx.gr.Markdown(
            "# mmattn\nPublished attention methods on models you have, beside the untouched model."
        )
        with ctx.gr.Tabs():
            for label, module in TABS:
                with ctx.gr.Tab(label):
                    module.add(ctx)
    return demo


if __name__ == "__main__":
    parts.run_alone("")
