"""What the transformers host knows of one tower of a model; its hooks are built from it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from mmattn.hosts.transformers_features import Family
from mmattn.hosts.transformers_layout import ImageTokens
from mmattn.runs import Pictures, Root
from mmattn.sites import Site


@dataclass
class Tower(Root):
    """One tower of a model: its forward is the unit in which all of its sites must run.

    Args:
        role: ``vision``, ``qformer`` or ``language``.
        tokens: image positions; the language tower of a vision-language model only.
        fusion: the model that puts image features among the token embeddings.
        family: how that model packs its image features, at the tower before which tokens are dropped: the
            language tower, or the Q-Former that stands before it. None where pruning is not known.
        vision: sites of the vision tower that feeds this tower.
        prunable: whether any tower of the target has a `family`.
        language: the language tower behind the logits; the whole model only.
        inner: path of the language model that the whole model lets generate alone, and that model.
        pictures: the last call for image features.
    """

    role: str = "language"
    tokens: ImageTokens | None = None
    fusion: torch.nn.Module | None = None
    family: Family | None = None
    vision: list[Site] = field(default_factory=list)
    prunable: bool = False
    language: Tower | None = None
    inner: tuple[str, torch.nn.Module] | None = None
    pictures: Pictures | None = None
