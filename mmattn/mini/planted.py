"""Attention sinks for the small vision-language model, planted where large models grow their own.

A large decoder has a few neurons early on that answer to the first token, and to image tokens that say
nothing, with activations a hundred times the usual. After normalisation such tokens all look alike, keys
of later blocks match the usual query there, and their values are silent: a head that has nothing to say
rests on them ("Massive Activations in Large Language Models", arXiv 2402.17762; "When Attention Sink
Emerges in Language Models", arXiv 2410.10781). Some thousand steps on this world grow none of that, so it
is written into the weights before the last stage of training. Whether heads go on resting on the first
token is then up to training. The neuron of the empty image tokens is soon undone by it, even if the neuron
itself is held, so it is written once more after the last step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d, silu
from transformers import LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from mmattn.mini import objects

DIMS = (37, 101)
"""Hidden dimensions in which sinks stand out; the second has half the size and the other sign."""

FIRST = 15.0
"""Activation of the first token in `DIMS`, in root mean squares of the image tokens' states."""

IMAGE = 6.0
"""The same of empty image tokens."""

SHARE = 0.35
"""Share of attention that the first token is given in every head of the later blocks, before the image
sinks take theirs."""


def empty(labels: Tensor) -> Tensor:
    """Patches without any object on them or beside them: ``[B, 64]`` bool from labels ``[B, 64]``."""
    side = objects.SIZE // objects.PATCH
    grid = (labels > 0).float().view(-1, 1, side, side)
    return max_pool2d(grid, 3, 1, 1).flatten(1) == 0


class _Watch:
    """Runs the model on its conversations and keeps what some of its modules were given and returned."""

    def __init__(
        self, model: LlavaForConditionalGeneration, tokens: Tensor, pixels: Tensor, labels: Tensor
    ) -> None:
        self._model = model
        self._call = {"input_ids": tokens, "pixel_values": pixels}
        self.decoder: Any = model.model.language_model
        self.kept: dict[str, Any] = {}
        self.real = tokens != model.generation_config.pad_token_id
        self.shown = tokens == model.config.image_token_id
        self.empty = torch.zeros_like(self.shown)
        self.empty[self.shown] = empty(labels).flatten()
        self.first = torch.zeros_like(self.shown)
        self.first[:, 0] = True

    def __call__(self, **modules: torch.nn.Module) -> Any:
        """Attention, hidden states; input and output of `modules` go to `kept` under their names."""
        hooks = [
            module.register_forward_hook(
                lambda _, given, out, name=name: self.kept.update({name: (given[0], out)})
            )
            for name, module in modules.items()
        ]
        before = self._model.config.get_text_config()._attn_implementation
        self._model.eval()
        self._model.set_attn_implementation("eager")
        seen = self._model(
            **self._call, output_attentions=True, output_hidden_states=True, use_cache=False
        )
        self._model.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()
        return seen


@torch.no_grad()
def plant(
    model: LlavaForConditionalGeneration,
    tokens: Tensor,
    pixels: Tensor,
    labels: Tensor,
    spoken: Tensor,
) -> None:
    """Write sinks into a trained model: the first token, and image tokens that show nothing.

    Two neurons of block 0 answer to them and write into `DIMS`. From block 1 on, the keys of these
    dimensions match the mean query of every head, strongly enough for `SHARE`, and the values ignore them.
    The model is left in evaluation mode.

    Args:
        model: The model, changed in place.
        tokens: Token ids ``[B, T]`` of conversations, each with one picture and the same first token.
        pixels: Their pictures ``[B, 3, 64, 64]``, normalised.
        labels: Patch labels ``[B, 64]``.
        spoken: ``[B, T]`` bool, the words that the assistant says; queries are averaged over these.
    """
    watch = _Watch(model, tokens, pixels, labels)
    _neuron(watch, 0, watch.first, FIRST)
    _neuron(watch, 1, watch.empty, IMAGE)
    for block in watch.decoder.layers[1:]:
        _aim(block.self_attn, watch, spoken)


@torch.no_grad()
def plant_image(
    model: LlavaForConditionalGeneration, tokens: Tensor, pixels: Tensor, labels: Tensor
) -> None:
    """Write the neuron of the empty image tokens once more; arguments as of `plant`."""
    watch = _Watch(model, tokens, pixels, labels)
    _neuron(watch, 1, watch.empty, IMAGE)


def _neuron(watch: _Watch, neuron: int, chosen: Tensor, size: float) -> None:
    """Let a neuron of block 0 answer to the `chosen` tokens ``[B, T]`` and write `size` into `DIMS`."""
    mlp = watch.decoder.layers[0].mlp
    states = watch(mlp=mlp).hidden_states[1]
    entered = watch.kept["mlp"][0]
    # Ridge regression: high on the chosen tokens, below zero on all others, where SiLU is small.
    inputs, wanted = entered[watch.real], torch.where(chosen[watch.real], 6.0, -1.5)
    ridge = 1e-3 * len(inputs) * torch.eye(inputs.shape[1], device=inputs.device)
    weight = torch.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ wanted)
    answer = entered[chosen] @ weight
    target = size * states.square().mean(-1).sqrt()[watch.shown].mean()
    written = target / (silu(answer) * answer).median()
    mlp.gate_proj.weight[neuron] = weight
    mlp.up_proj.weight[neuron] = weight
    mlp.down_proj.weight[:, neuron] = 0
    mlp.down_proj.weight[DIMS[0], neuron] = written
    mlp.down_proj.weight[DIMS[1], neuron] = -0.5 * written


def _aim(attention: Any, watch: _Watch, spoken: Tensor) -> None:
    """Match the keys of `DIMS` with the mean query of every head, and silence their values."""
    attention.v_proj.weight[:, list(DIMS)] = 0
    dim = attention.head_dim
    seen = watch(query=attention.q_proj, key=attention.k_proj, turn=watch.decoder.rotary_emb)
    kept = watch.kept
    split = (*spoken.shape, -1, dim)
    query, key = (kept[name][1].view(split).transpose(1, 2) for name in ("query", "key"))
    query, key = apply_rotary_pos_emb(query, key, *kept["turn"][1])
    own = (query * key).sum(-1) * attention.scaling
    weights = seen.attentions[attention.layer_idx].diagonal(dim1=-2, dim2=-1)
    total = own - weights.clamp_min(1e-12).log()  # log of the softmax's denominator
    size = kept["key"][0][:, 0, DIMS[0]].mean()
    for head in range(query.shape[1]):
        mean = query[:, head][spoken].mean(0)
        direction = mean / mean.norm()
        score = total[:, head][spoken].mean() + torch.tensor(SHARE / (1 - SHARE)).log()
        unit = (query[:, head][spoken] @ direction).mean() * attention.scaling
        rows = slice(head * dim, (head + 1) * dim)
        attention.k_proj.weight[rows, DIMS[0]] = score / unit / size * direction
        attention.k_proj.weight[rows, DIMS[1]] = 0
