"""LoRA files of FLUX transformers in the two spellings that people load: diffusers' and ComfyUI's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from mmattn.batch.writers import atomic
from mmattn.errors import ConfigError

PREFIX = "transformer."
"""What diffusers expects before the path of a layer."""

_DOUBLE = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn_proj": ("attn.to_out.0",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn_proj": ("attn.to_add_out",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "txt_mod_lin": ("norm1_context.linear",),
}
_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
}
_BLOCK = re.compile(r"(single_)?transformer_blocks\.(\d+)\.")


def diffusers_keys(transformer: Any, adapter: str) -> dict[str, Tensor]:
    """The weights of a LoRA adapter of a transformer, as ``pipe.load_lora_weights`` takes them."""
    held = get_peft_model_state_dict(transformer, adapter_name=adapter)
    return {PREFIX + key: value for key, value in held.items()}


def comfyui_keys(lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights in ComfyUI's (sd-scripts') spelling, exactly.

    There q, k, v and, in single blocks, the MLP are one layer. Their factors stand side by side: the
    downs stacked, the ups as the blocks of a diagonal, so nothing is approximated; the rank is three or
    four times as high and alpha is equal to it.

    Args:
        lora: keys of `diffusers_keys`.

    Raises:
        ConfigError: a layer that FLUX's blocks do not have, or a fused layer of which only a part is
            adapted.
    """
    left = dict(lora)
    blocks = sorted(
        {m.group() for key in lora if (m := _BLOCK.search(key))},
        key=lambda name: ("single" in name, int(name.split(".")[-2])),
    )
    made: dict[str, Tensor] = {}
    for block in blocks:
        single, number = "single" in block, block.split(".")[-2]
        for theirs, ours in (_SINGLE if single else _DOUBLE).items():
            keys = [f"{PREFIX}{block}{name}.lora_" for name in ours]
            there = [f"{key}A.weight" in left for key in keys]
            if not any(there):
                continue
            if not all(there):
                raise ConfigError(
                    f"ComfyUI's {theirs} of {block[:-1]} holds {', '.join(ours)} together, and only "
                    "some of them have a LoRA; train all of them, or keep the diffusers file"
                )
            downs = [left.pop(f"{key}A.weight") for key in keys]
            ups = [left.pop(f"{key}B.weight") for key in keys]
            down = torch.cat(downs)
            name = f"lora_unet_{'single' if single else 'double'}_blocks_{number}_{theirs}"
            made[f"{name}.lora_down.weight"] = down
            made[f"{name}.lora_up.weight"] = torch.block_diag(*ups)
            made[f"{name}.alpha"] = torch.tensor(float(len(down)), dtype=down.dtype)
    if left:
        raise ConfigError(f"ComfyUI's FLUX has no place for {sorted(left)[:5]}")
    return made


def write_lora(
    weights: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write weights in half precision; the file appears whole or not at all."""
    half = {key: value.detach().cpu().half().contiguous() for key, value in weights.items()}
    with atomic(path) as temporary:
        save_file(half, temporary, metadata={"format": "pt", **(metadata or {})})
    return path
