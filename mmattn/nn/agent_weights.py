"""How agent models are described to timm, and how official checkpoints become theirs."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from mmattn.nn.agent import AgentAttention, stretch

_TABLES = {
    "an_bias": "key_bias.block",
    "ah_bias": "key_bias.row",
    "aw_bias": "key_bias.col",
    "ac_bias": "key_bias.prefix",
    "na_bias": "query_bias.block",
    "ha_bias": "query_bias.row",
    "wa_bias": "query_bias.col",
    "ca_bias": "query_bias.prefix",
    "dwc.": "value_conv.",
    "get_v.": "value_conv.",
    "sr.": "reduce.",
    "norm.": "reduce_norm.",
}


def convert_layer(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Rename the tensors of one official agent layer, and bring its tables to the shapes used here.

    Args:
        state: official names behind `prefix` (``an_bias``, ``ah_bias``, ..., ``dwc``/``get_v``, ``qkv`` or
            ``q`` and ``kv``, ``proj``, ``sr``, ``norm``).
        prefix: ``blocks.0.attn.`` or alike; may be empty.

    Returns:
        The layer's tensors under the names of `AgentAttention`, behind the same prefix.
    """
    layer = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    out: dict[str, Tensor] = {}
    for key, value in layer.items():
        name = next(
            (new + key[len(old) :] for old, new in _TABLES.items() if key.startswith(old)), key
        )
        if match := re.fullmatch(r"([ahwc])([ahwc])_bias", key):
            value = value[0]
            # Query-side tables are stored cell first, agent last.
            value = (value if match[1] == "a" else value.movedim(-1, 1)).flatten(2)
        out[prefix + name] = value
    for kind in ("weight", "bias"):
        if f"{prefix}q.{kind}" in out:
            parts = [out.pop(f"{prefix}{part}.{kind}") for part in ("q", "kv")]
            out[f"{prefix}qkv.{kind}"] = torch.cat(parts)
    return out


def fit_tables(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Resize row and column tables of a state dict to the grids of `model`, linearly (published recipe)."""
    sizes = {k: v.shape[-1] for k, v in model.state_dict().items() if k.endswith((".row", ".col"))}
    return {k: stretch(v, sizes[k]) if k in sizes else v for k, v in state.items()}


def agent_layers(model: nn.Module) -> dict[str, AgentAttention]:
    """The agent layers of a model by their path."""
    return {n: m for n, m in model.named_modules() if isinstance(m, AgentAttention)}


def convert_layers(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Convert every agent layer of `model` in a state dict with `convert_layer`; the rest stays."""
    paths = tuple(f"{path}." for path in agent_layers(model))
    out = {k: v for k, v in state.items() if not k.startswith(paths)}
    for path in paths:
        out |= convert_layer(state, path)
    return out


def cfg(**kwargs: Any) -> dict[str, Any]:
    """timm's description of a model without weights, trained as ImageNet models of this family are."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "paper_ids": "arXiv:2312.08874",
        **kwargs,
    }
