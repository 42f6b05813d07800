"""Agent-DeiT: vision transformers with agent attention, registered with timm.

From "Agent Attention: On the Integration of Softmax and Linear Attention", arXiv 2312.08874. The frame is
timm's `VisionTransformer`; blocks that use agents hold an `AgentAttention` in place of timm's attention.
Parameters and multiply-adds equal those of the authors' models. Their checkpoints load through
`checkpoint_filter_fn`; they carry no licence and are not offered for download here.
"""

from __future__ import annotations

from typing import Any

from timm.layers import get_device_dtype, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import (
    VisionTransformer,
    checkpoint_filter_fn as vit_checkpoint_filter_fn,
)
from torch import Tensor

from mmattn.nn.agent import AgentAttention
from mmattn.nn.agent_weights import agent_layers, cfg, convert_layers, fit_tables

__all__ = ["AgentDeiT"]


class AgentDeiT(VisionTransformer):
    """A vision transformer whose first blocks attend through agents.

    Args:
        agents: agents per attention layer, a square number.
        agent_blocks: how many blocks, counted from the first, use agents; None: all.
        **kwargs: of timm's `VisionTransformer`. With `dynamic_img_size` any square image is taken;
            `set_input_size` resizes the model to any rectangle.

    Raises:
        ValueError: patch dropout, which leaves no grid to pool agents from.
    """

    def __init__(self, agents: int = 49, agent_blocks: int | None = None, **kwargs: Any) -> None:
        if kwargs.get("patch_drop_rate"):
            raise ValueError(
                "AgentDeiT pools agents over the whole grid; patch_drop_rate must be 0."
            )
        super().__init__(**kwargs)
        dd = get_device_dtype(self)
        for block in list(self.blocks)[:agent_blocks]:
            block.attn = AgentAttention(
                self.embed_dim,
                block.attn.num_heads,
                agents,
                self.patch_embed.grid_size,
                prefix=self.num_prefix_tokens,
                qkv_bias=kwargs.get("qkv_bias", True),
                attn_drop=kwargs.get("attn_drop_rate", 0.0),
                proj_drop=kwargs.get("proj_drop_rate", 0.0),
                **dd,
            )
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Resize position embedding and bias tables to another image or patch size."""
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        for layer in agent_layers(self).values():
            layer.set_grid(self.patch_embed.grid_size)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: AgentDeiT) -> dict[str, Tensor]:
    """Turn an official state dict into ours, and fit it to the model's image size.

    ``blocks.i.attn.{an,ah,aw,ac}_bias`` become ``key_bias.{block,row,col,prefix}``, ``{na,ha,wa,ca}_bias``
    become ``query_bias...``, ``dwc`` becomes ``value_conv``; all else is named as in timm. Position
    embeddings are resampled, row and column tables stretched linearly.
    """
    state_dict = state_dict.get("model", state_dict)  # type: ignore[assignment]
    if any(key.endswith("an_bias") for key in state_dict):
        state_dict = convert_layers(state_dict, model)
    fitted = fit_tables(state_dict, model)
    return vit_checkpoint_filter_fn(fitted, model)  # type: ignore[no-any-return]


default_cfgs = generate_default_cfgs(
    {
        f"agent_deit_{size}.untrained": cfg(fixed_input_size=True)
        for size in ("tiny", "small", "base")
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> AgentDeiT:
    model: AgentDeiT = build_model_with_cfg(
        AgentDeiT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **kwargs,
    )
    return model


@register_model  # type: ignore[untyped-decorator]
def agent_deit_tiny(pretrained: bool = False, **kwargs: Any) -> AgentDeiT:
    """Agent-DeiT-T: 6.0 M parameters, 1.2 G multiply-adds at 224."""
    args = {"embed_dim": 192, "num_heads": 3}
    return _create("agent_deit_tiny", pretrained, **(args | kwargs))


@register_model  # type: ignore[untyped-decorator]
def agent_deit_small(pretrained: bool = False, **kwargs: Any) -> AgentDeiT:
    """Agent-DeiT-S: 22.7 M parameters, 4.4 G multiply-adds at 224; published at 224 and 448."""
    args = {"embed_dim": 384, "num_heads": 6, "drop_path_rate": 0.1}
    return _create("agent_deit_small", pretrained, **(args | kwargs))


@register_model  # type: ignore[untyped-decorator]
def agent_deit_base(pretrained: bool = False, **kwargs: Any) -> AgentDeiT:
    """Agent-DeiT-B: 81 agents in the first four blocks; 87.2 M parameters, 17.6 G multiply-adds."""
    args = {
        "embed_dim": 768,
        "num_heads": 12,
        "agents": 81,
        "agent_blocks": 4,
        "drop_path_rate": 0.3,
    }
    return _create("agent_deit_base", pretrained, **(args | kwargs))
