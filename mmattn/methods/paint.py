"""PAINT: raise the last query's scores at the image tokens that the vision tower informs most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from mmattn_kernels import attention_with_column_mass

from mmattn.errors import UnsupportedCall
from mmattn.layout import Tile
from mmattn.methods import _decoder_keys as decoder
from mmattn.methods.base import Dense, Method, require
from mmattn.sites import Site

_NONE, _LOCAL, _SUMMARY = range(3)


@dataclass(frozen=True, kw_only=True)
class PAINT(Method):
    """Adds ``alpha |s|`` to the last query's score s at local image tokens and ``beta |s|`` at summary ones.

    The vision tower says which tokens are informed. Patches that the class token attends to in the first
    block carry local detail; the few that stand out in the late block whose output the language model gets
    hold a summary of the whole image. Only these are raised, in every head, for the prompt's last token
    and for every generated one.

    Paper: "Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language
    Model", arXiv 2501.12206; compared there with plain decoding and PAI on CHAIR. Follows the authors'
    code (hasanar1f/llava-hallunication-fix @c5ee7da) in its default setting.

    Deviations: every image has its own tokens, where the code lets the first image of a batch decide for
    all; `share` is honoured, where the code's switch for it changes a file name only. The optional third,
    spatial, set is left out (its scores in the code are one for every token), and so are head-wise
    gains, for which neither code nor formula was found, and the guidance that belongs to PAI. In towers
    without a class token (SigLIP, Qwen) the mean over all queries stands for it, which is ours.

    Args:
        alpha: how much of a score's size is added at local tokens, at least 0; the code's 0.7. The
            authors found a cliff beyond: the effect depends on how large a model's scores are.
        beta: the same at summary tokens, at least 0; the code's 0.3. With both at 0 nothing is changed,
            bitwise.
        share: local tokens as a share of the image's, in [0, 1]; the code's 0.25. Those that are summary
            tokens too count as these.
        local_layer: vision block of the local tokens, 0-based; the first. It must attend to the whole
            image.
        layers: decoder blocks, 0-based, negative from the end. None takes all but the first two of 32
            blocks; fewer blocks leave out their share, at least one.

    Shapes: one row of vision scores ``[T, N]`` per block, one row of decoder scores ``[B, H, 1, K]`` per
    call. In the report, ``local`` and ``summary`` are tokens per image, ``won`` the probability that the
    raised tokens won.

    Raises:
        ConfigError: for a setting out of range.
        UnsupportedCall: for prompts padded on the right, images cut into tiles (LLaVA-NeXT), windowed
            blocks, and images that the tower did not see in the same call.

    A prompt that is fed in parts has the last query of every part changed. As it reads the image
    features, it cannot be combined with a method that prunes them.
    """

    alpha: float = 0.7
    beta: float = 0.3
    share: float = 0.25
    local_layer: int = 0
    layers: tuple[int, ...] | None = None

    name: ClassVar[str] = "paint"
    seams: ClassVar[tuple[str, ...]] = ("attention", "features")
    kinds: ClassVar[tuple[str, ...]] = ("self",)
    hosts: ClassVar[tuple[str, ...]] = ("transformers",)
    needs: ClassVar[frozenset[str]] = frozenset({"image_tokens"})
    paper: ClassVar[str] = (
        "Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language "
        "Model, arXiv 2501.12206"
    )
    masks: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    grouped: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for knob in ("alpha", "beta"):
            require(
                getattr(self, knob) >= 0, f"{knob} must be at least 0, got {getattr(self, knob)}"
            )
        require(0 <= self.share <= 1, f"share must be in [0, 1], got {self.share}")
        fits = type(self.local_layer) is int and self.local_layer >= 0
        require(fits, f"local_layer must be a block number, got {self.local_layer!r}")
        decoder.check_layers(self.layers)

    @property
    def passive(self) -> bool:
        """True when no score is raised."""
        return self.alpha == 0 and self.beta == 0

    def accepts(self, site: Site) -> str | None:
        """Two blocks of the vision tower, and decoder blocks among `layers`."""
        if "vision" not in site.tags:
            return decoder.refusal(site, self.chosen(site.depth), image=True)
        if "prunable" not in site.tags:
            return (
                "it is not in a vision tower that feeds a language model with known packing (LLaVA, "
                "Qwen2-VL, Qwen2.5-VL)"
            )
        if self.local_layer >= site.depth:
            return f"local_layer={self.local_layer} is deeper than the tower's {site.depth} blocks"
        if "output" in site.tags or site.index == self.local_layer:
            return None
        return "its attention is not used"

    def chosen(self, depth: int) -> set[int]:
        """Blocks of a decoder with `depth` of them."""
        if self.layers is not None:
            return decoder.from_end(self.layers, depth)
        return decoder.middle_layers(depth)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        mask: torch.Tensor | None,
        scale: float | None,
        site: Site,
        dense: Dense,
    ) -> torch.Tensor:
        """In the tower, look at the class token's row; in the decoder, change the last query."""
        if self.passive:
            return dense(q, k, v)
        if "vision" in site.tags:
            self._watch(q, k, scale, site)
            return dense(q, k, v)
        keys = decoder.read(q, k, mask, site)
        if not bool(keys.image.any()):
            return dense(q, k, v)
        labels = self._labels(keys, site)
        gain = self.alpha * (labels == _LOCAL) + self.beta * (labels == _SUMMARY)
        last, won = decoder.lifted_last_row(q, k, v, scale, keys, gain)
        site.note("won", won[keys.image.any(1)])
        return last if keys.queries == 1 else torch.cat([dense(q, k, v)[:, :, :-1], last], 2)

    def _watch(self, q: torch.Tensor, k: torch.Tensor, scale: float | None, site: Site) -> None:
        if torch.compiler.is_compiling():
            raise UnsupportedCall(
                "Scores cannot be carried out of a compiled tower; compile the language model's layers "
                "instead."
            )
        if "windowed" in site.tags:
            raise UnsupportedCall(
                f"Block {site.index} attends inside windows only, so its scores do not compare across "
                "the image. Choose local_layer among the blocks with full attention."
            )
        call, site.call = site.call, 0  # one list for all calls of a forward (Qwen: one per image)
        if call == 0:
            site.state["scores"] = []  # a new list: `features` tells forwards apart by it
        site.state["scores"].append(informed(q.detach(), k.detach(), scale, site))
        site.call = call

    def features(self, tile: Tile, *, site: Site) -> torch.Tensor:
        """Label the tokens of one image; all are kept."""
        total = tile.features.shape[0]
        everything = torch.arange(total, device=tile.features.device)
        if self.passive:
            return everything
        shared = site.shared
        towers = {t.index: t for t in tile.tower}
        late = next((t for t in tile.tower if "output" in t.tags), None)
        early = towers.get(self.local_layer)
        record: list[torch.Tensor] = early.state.get("scores", []) if early is not None else []
        if shared.get("record") is not record or tile.tiles != 1:
            shared.update(record=record, labels=[], placed=None)
        if late is None or not record or not late.state.get("scores"):
            raise UnsupportedCall(
                "PAINT needs the scores of the tower's local block and of its output block; leave both "
                "among the attached sites, and run the tower with the language model."
            )
        if tile.tiles != 1:
            raise UnsupportedCall(
                "PAINT labels images that are one tile; LLaVA-NeXT packs several tiles and separators."
            )
        labels = label(tile.gather(record), tile.gather(late.state["scores"]), self.share)
        shared["labels"].append(labels)
        site.note("local", (labels == _LOCAL).sum())
        site.note("summary", (labels == _SUMMARY).sum())
        return everything

    @staticmethod
    def _labels(keys: decoder.Keys, site: Site) -> torch.Tensor:
        """``[B, K]`` labels of the keys of this call."""
        shared, prompt = site.shared, site.layout.image_mask
        assert prompt is not None
        rows = keys.image.shape[0]
        if shared.get("for") is not prompt or shared.get("placed") is None:
            shared["placed"] = place(shared.get("labels", []), prompt[:rows])
            shared["for"] = prompt
        placed: torch.Tensor = shared["placed"][:rows, : keys.image.shape[1]]
        return decoder.widen(placed, keys.image.shape[1])


def informed(q: torch.Tensor, k: torch.Tensor, scale: float | None, site: Site) -> torch.Tensor:
    """Attention of the class token to every token, mean over heads, ``[T, N]`` fp32.

    Without a class token, the mean over all queries.
    """
    grid = site.layout.grid
    if grid is None or q.shape[2] == grid[0] * grid[1] * grid[2]:
        _, _, mass = attention_with_column_mass(q, k, k, scale=scale)
        return mass.mean(1) / q.shape[2]
    return decoder.row_scores(q[:, :, :1], k, scale).softmax(-1)[:, :, 0].mean(1)


def label(local: torch.Tensor, summary: torch.Tensor, share: float) -> torch.Tensor:
    """``[M]``: 2 where `summary` stands out, 1 at the largest `share` of `local` otherwise, 0 elsewhere.

    Standing out is the box plot's rule: above the upper quartile by more than 1.5 times the distance of
    the quartiles.
    """
    quarters = torch.quantile(
        summary.double(), torch.tensor([0.25, 0.75]).double().to(summary.device)
    )
    limit = quarters[1] + 1.5 * (quarters[1] - quarters[0])
    labels = torch.zeros_like(local, dtype=torch.long)
    ranked = torch.argsort(local, dim=0, descending=True, stable=True)  # ties by position
    labels[ranked[: int(local.shape[0] * share)]] = _LOCAL
    labels[summary.double() > limit] = _SUMMARY
    return labels


def place(labels: list[torch.Tensor], image: torch.Tensor) -> torch.Tensor:
    """Labels of the images of a call at the image tokens of its prompts ``[B, N]``.

    Beams share their images: every image may serve several neighbouring rows.

    Raises:
        UnsupportedCall: when there are not as many labels as image tokens.
    """
    counts = image.sum(1)
    given = torch.cat(labels).to(image.device) if labels else counts[:0]
    copies, rest = divmod(int(counts.sum()), max(1, len(given)))
    groups = counts[::copies] if copies else counts[:0]
    fits = not rest and len(groups) * copies == len(counts)
    if not fits or not torch.equal(groups.repeat_interleave(copies), counts):
        raise UnsupportedCall(
            f"The prompts have {int(counts.sum())} image tokens, and the vision tower informed "
            f"{len(given)} last. Pass pixel_values with the prompts, and generate one prompt after the "
            "other."
        )
    placed = torch.zeros(image.shape, dtype=torch.long, device=image.device)
    for group, own in enumerate(given.split(groups.tolist())):
        for row in range(group * copies, (group + 1) * copies):
            placed[row, image[row]] = own
    return placed
