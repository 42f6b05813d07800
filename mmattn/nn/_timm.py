"""How a family of four-stage backbones is made known to timm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from timm.models import build_model_with_cfg, register_model


def pyramid_cfg(**kwargs: Any) -> dict[str, Any]:
    """What timm wants to know of a pretrained model, here without weights."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj.0",
        "classifier": "head.fc",
        **kwargs,
    }


def register_pyramid(
    cls: type, name: str, settings: Mapping[str, Any], filter_fn: Callable[..., Any], module: str
) -> Any:
    """Register `cls` with `settings` under `name`; returns the entry point.

    Args:
        filter_fn: maps the authors' state dicts to ours.
        module: the module whose ``default_cfgs`` holds `name`; timm looks there.
    """

    def create(pretrained: bool = False, **kwargs: Any) -> Any:
        return build_model_with_cfg(
            cls,
            name,
            pretrained,
            pretrained_filter_fn=filter_fn,
            feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
            **{**settings, **kwargs},
        )

    create.__name__ = create.__qualname__ = name
    create.__module__ = module
    create.__doc__ = f"`{cls.__name__}` with the settings of {name}."
    return register_model(create)
