"""What `InContextPipeline` settles before it runs: captions, layout, method, arguments of the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from mmattn.errors import ConfigError, suggest
from mmattn.methods.panel_attention import PanelAttention
from mmattn_pipelines._panel_latents import Color, KeepGiven, codec_for, filled
from mmattn_pipelines.captions import SetCaption
from mmattn_pipelines.panels import PanelLayout

Visibility = str | Sequence[Sequence[bool]]
_OURS = ("prompt", "height", "width", "image", "mask_image", "masked_image_latents")
_SLOTS = ("joint_attention_kwargs", "attention_kwargs", "cross_attention_kwargs")


def one_of(name: str, value: str, known: Sequence[str]) -> None:
    """Raise `ConfigError` unless `value` is known."""
    if value not in known:
        raise ConfigError(f"{name} is one of {list(known)}, got {value!r}")


def check_arguments(pipe: Any, takes: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that the pipeline does not take (some drop them in silence) or that are ours.

    Raises:
        ConfigError: names the argument.
    """
    for name in arguments:
        if name in _OURS:
            raise ConfigError(
                f"{name} follows from the caption, the layout and the references; leave it out"
            )
        if name not in takes:
            raise ConfigError(
                f"{type(pipe).__name__} takes no argument {name!r}{suggest(name, takes)}"
            )
    count = arguments.get("num_images_per_prompt") or 1
    if count != 1:
        raise ConfigError(
            f"one call draws one set; call again for another instead of num_images_per_prompt={count}"
        )


def captions_of(
    caption: SetCaption | str | Sequence[str], visibility: Visibility
) -> tuple[str, list[str] | None, int | None]:
    """The one text, or a text for each panel, and how many panels it speaks of (None: unknown)."""
    if isinstance(caption, SetCaption):
        if visibility != "group":
            return caption.text, None, len(caption.panels)
        joint = "" if not caption.overall else " " if caption.overall[-1] in ".:!?" else ", "
        pieces = [f"{caption.overall}{joint}{panel}" for panel in caption.panels]
        return caption.text, pieces, len(pieces)
    if isinstance(caption, str):
        if visibility == "group":
            raise ConfigError(
                "visibility='group' gives every panel a caption of its own; give a SetCaption or a list "
                "of captions"
            )
        try:
            return caption, None, len(SetCaption.parse(caption).panels)
        except ConfigError:  # any text is a caption; only one in the grammar tells how many panels
            return caption, None, None
    pieces = list(caption)
    if not pieces or not all(isinstance(piece, str) for piece in pieces):
        raise ConfigError(f"a list of captions has one text for every panel, got {caption!r}")
    return "", pieces, len(pieces)


def layout_for(
    pipe: Any,
    layout: PanelLayout | str,
    panel_size: tuple[int, int] | None,
    count: int | None,
    references: Sequence[Image.Image],
) -> PanelLayout:
    """The layout of a call; ``auto`` arranges the panels of the caption.

    Raises:
        ConfigError: numbers that disagree, nothing to tell a number or a size from, or no panel left to
            draw.
    """
    if layout == "auto":
        if count is None:
            raise ConfigError(
                "layout='auto' counts the panels of the caption, and a plain text has none; give a "
                "layout, a SetCaption, or a list with one caption per panel"
            )
        if panel_size is None:
            if not references:
                raise ConfigError(
                    "layout='auto' needs panel_size=(height, width) in pixels where there are no "
                    "references to take it from"
                )
            token, (width, height) = codec_for(pipe).token, references[0].size
            panel_size = max(1, height // token) * token, max(1, width // token) * token
        placed = PanelLayout.auto(count, *panel_size)
    elif panel_size is not None:
        raise ConfigError("panel_size goes with layout='auto'; a layout has a size of its own")
    else:
        placed = PanelLayout.preset(layout) if isinstance(layout, str) else layout
    if count not in (None, placed.count):
        raise ConfigError(
            f"the caption describes {count} panels and the layout has {placed.count}; they must agree"
        )
    if len(references) >= placed.count:
        raise ConfigError(
            f"{len(references)} references leave none of the {placed.count} panels to be drawn; use a "
            "layout with more panels"
        )
    return placed


def method_for(
    layout: PanelLayout, visibility: Visibility, given: int, *, split: bool
) -> PanelAttention | None:
    """The attention of a canvas, or None where every panel and all text see everything."""
    if layout.count == 1 or (visibility == "full" and not split):
        return None
    return PanelAttention(
        rows=layout.rows,
        cols=layout.cols,
        visibility=visibility,
        references=given,
        text="split" if split else "shared",
    )


def fill_arguments(
    layout: PanelLayout, given: Sequence[Image.Image], fill: Color
) -> dict[str, Any]:
    """What FLUX.1-Fill is conditioned on: the canvas, and a mask that is white where it is to draw."""
    mask = Image.new("L", (layout.width, layout.height), 255)
    for box in layout.boxes[: len(given)]:
        mask.paste(0, box)
    return {"image": filled(layout, given, fill), "mask_image": mask}


def common_arguments(
    pipe: Any,
    takes: Mapping[str, Any],
    arguments: Mapping[str, Any],
    lora_scale: float | None,
    **given: Any,
) -> dict[str, Any]:
    """Arguments that canvases and groups share; what is None is left to the pipeline's default.

    Raises:
        ConfigError: a LoRA scale without a LoRA, or for a pipeline that takes none.
    """
    found = {name: value for name, value in given.items() if value is not None}
    if "use_resolution_binning" in takes:
        found["use_resolution_binning"] = False  # it would change the size of the pictures
    if lora_scale is not None:
        model = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
        slot = next((name for name in _SLOTS if name in takes), None)
        if slot is None or not getattr(model, "peft_config", None):
            why = "takes no LoRA scale" if slot is None else "has no LoRA loaded"
            raise ConfigError(
                f"lora_scale={lora_scale} was asked for, and {type(pipe).__name__} {why}"
            )
        found[slot] = {**(arguments.get(slot) or {}), "scale": lora_scale}
    return found


def watching(
    pipe: Any,
    takes: Mapping[str, Any],
    keeper: KeepGiven | None,
    callback: Callable[..., Any] | None,
    wants: Sequence[str],
    legacy: Callable[..., Any] | None,
) -> dict[str, Any]:
    """Hand the callbacks to the pipeline, by whichever of its arguments there is.

    Args:
        keeper: keeps the given latents; None without references.
        callback, wants: the user's ``callback_on_step_end``, and the tensors it is to see.
        legacy: the user's ``callback``, of pipelines that have the older form.

    Raises:
        ConfigError: the pipeline has no such callback.
    """
    if "callback_on_step_end" in takes:
        if keeper is not None:
            keeper.then, keeper.wants = callback, wants
            callback, wants = keeper, sorted({"latents", *wants})
        if callback is None:
            return {}
        return {
            "callback_on_step_end": callback,
            "callback_on_step_end_tensor_inputs": list(wants),
        }
    if callback is not None:
        raise ConfigError(f"{type(pipe).__name__} takes no callback_on_step_end")
    if keeper is None:
        return {}
    if "callback" not in takes:
        raise ConfigError(
            f"{type(pipe).__name__} has no callback, so nothing can keep the references in place"
        )
    kept = keeper

    def after(step: int, t: Any, latents: Tensor) -> None:
        latents.copy_(
            kept.blend(pipe.scheduler, step, latents)
        )  # the loop goes on with this tensor
        if legacy is not None:
            legacy(step, t, latents)

    return {"callback": after, "callback_steps": 1}
