"""What the small vision-language model is taught besides its next word, only while it is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, layer_norm
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from mmattn.mini import objects, planted
from mmattn.mini.vlm import BOS


class Alignment:
    """The loss of a patch that does not speak the decoder's language.

    What the projector makes of a patch is compared with the decoder's own word vectors: it should
    be near the name of the object it shows and near the words for its place. Then the word "apple"
    in a question finds apple patches by likeness, which otherwise takes far longer to learn. A patch
    with nothing on it or beside it speaks the begin-of-text token.
    """

    def __init__(self, model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
        vocab = processor.tokenizer.get_vocab()
        device = model.device
        self._words = model.get_input_embeddings()
        self._names = torch.tensor([vocab[name] for name in objects.NAMES], device=device)
        self._rows = torch.tensor([vocab[w] for w in ("top", "center", "bottom")], device=device)
        self._columns = torch.tensor([vocab[w] for w in ("left", "center", "right")], device=device)
        zone = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2], device=device)
        self._row = zone.repeat_interleave(len(zone))
        self._column = zone.repeat(len(zone))
        # Most patches are background.
        self._weight = torch.ones(len(objects.NAMES) + 2, device=device)
        self._weight[[0, -1]] = 0.3

    def __call__(self, projected: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of projected patches `[B, 64, 128]` with object labels `[B, 64]`."""
        patches = projected.flatten(0, 1)
        names = patches @ self._words.weight[self._names].T
        nothing = patches @ self._words.weight[[BOS]].T
        shown = torch.cat([torch.zeros_like(nothing), names, nothing], dim=1)
        target = labels.masked_fill(planted.empty(labels), len(objects.NAMES) + 1)
        loss = cross_entropy(shown, target.flatten(), weight=self._weight)
        for words, zone in ((self._rows, self._row), (self._columns, self._column)):
            place = patches @ self._words.weight[words].T
            loss = loss + 0.2 * cross_entropy(place, zone.repeat(len(projected)))
        return loss


class Context(nn.Module):
    """The loss of a tower that does not look at objects; thrown away after stage 1.

    The class token and every patch should tell which objects the whole picture has. They can only learn
    it from the patches that show them, so attention in the late blocks goes there.
    """

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.probe = nn.Linear(tower.config.hidden_size, len(objects.NAMES), device=tower.device)

    def forward(self, states: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of the tower's last states `[B, 65, 96]` with object labels `[B, 64]`."""
        said = self.probe(layer_norm(states, states.shape[-1:]))
        there = torch.zeros_like(said[:, 0, :1]).repeat(1, len(objects.NAMES) + 1)
        there = there.scatter(1, labels, 1.0)[:, None, 1:].expand(-1, said.shape[1], -1)
        whole = binary_cross_entropy_with_logits(said[:, :1], there[:, :1])
        return 0.5 * whole + 0.3 * binary_cross_entropy_with_logits(said[:, 1:], there[:, 1:])


class Price:
    """What attention writes in every block, as a share of the state that it is added to.

    Made cheap, silence is what idle heads learn: they rest on tokens whose values are nothing.
    """

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        self._shares: list[Tensor] = []
        self._hooks = []
        for block in model.model.language_model.layers:
            entering: dict[str, Tensor] = {}
            self._hooks += [
                block.register_forward_pre_hook(
                    lambda _, given, entering=entering: entering.update(x=given[0])
                ),
                block.self_attn.register_forward_hook(
                    lambda _, __, out, entering=entering: self._shares.append(
                        out[0].norm(dim=-1) / (entering["x"].detach().norm(dim=-1) + 1e-3)
                    )
                ),
            ]

    def __call__(self, real: Tensor) -> Tensor:
        """Return the mean share of the last forward over tokens that are no padding `[B, T]`."""
        share = torch.stack(self._shares).mean(0)
        self._shares.clear()
        return (share * real).sum() / real.sum()

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
