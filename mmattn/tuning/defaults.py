"""What tuning tries when nobody says otherwise."""

from __future__ import annotations

from mmattn.loading import Loaded
from mmattn.methods.base import Method
from mmattn.methods.neighborhood import NeighborhoodAttention
from mmattn.methods.vmoba import VMoBA


def default_candidates(loaded: Loaded) -> list[Method]:
    """VMoBA at a half, a quarter and an eighth of its chunks, and windows of much the same share.

    A model of some hundred tokens has too few of VMoBA's usual chunks to choose among; it gets chunks
    of a few tokens.
    """
    chunks = (0.25, (3, 3), (1, 3, 3)) if loaded.embedded and loaded.kind == "t2v" else None
    methods: list[Method] = [VMoBA(topk=share, chunks=chunks) for share in (0.5, 0.25, 0.125)]
    video = loaded.kind == "t2v"
    # Shares of each axis; over all axes about a half, a quarter and an eighth of the tokens.
    windows = (0.8, 0.63, 0.5) if video else (0.7, 0.5, 0.35)
    return methods + [NeighborhoodAttention(window=window) for window in windows]


def default_prompts(loaded: Loaded) -> list[str]:
    """Four held-out captions of an embedded model."""
    from mmattn.mini.scenes import make_clips, make_scenes

    made = make_clips(4, 900_000) if loaded.kind == "t2v" else make_scenes(4, 900_000)
    return [item.caption for item in made]
