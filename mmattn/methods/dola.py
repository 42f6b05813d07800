"""DoLa: contrast the last layer's prediction with that of an earlier layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from mmattn.errors import UnsupportedCall
from mmattn.methods._streams import checked, contrast, plausible
from mmattn.methods.base import Method, require
from mmattn.runs import ModelCall
from mmattn.sites import Site

_BUCKETS = ("low", "high")


@dataclass(frozen=True, kw_only=True)
class DoLa(Method):
    """Subtracts the log-probabilities of a premature layer, chosen for every token anew.

    Facts settle in late layers, the run of the language in early ones. Hidden states of candidate layers
    go through the model's own head, without the final norm. The layer that disagrees most with the last
    one is the premature layer ``l``, and ``log p_last - log p_l`` is what the token is drawn from. Tokens
    less than `relative_top` times as likely as the last layer's likeliest cannot be chosen.

    Paper: "DoLa: Decoding by Contrasting Layers Improves Factuality in Large Language Models",
    arXiv 2309.03883, and the authors' code; compared with the formula on the hidden states that
    transformers returns. Disagreement is the code's: half the sum of ``KL(M || p_last)`` and
    ``KL(M || p_l)`` with ``M`` the mean of both, which is not the textbook's Jensen-Shannon divergence.

    Deviations: each row, and each position of a call, chooses its own layer, where the code averages over
    the batch. Tokens cut off get minus infinity, where the code has -1000. The buckets of other depths
    than 32 are halves of the model; as in transformers, layer 0 is left out when the head shares the
    embedding's weights, because it would predict the token it was given. The paper's repetition penalty
    is `generate`'s own (``repetition_penalty=1.2``). The prompt's last position is changed and everything
    after it, not the positions before.

    Args:
        layers: candidates, counted in blocks that have run, from 0 (the embeddings) to one less than the
            depth, negative from the end. ``"low"`` takes the even ones of the first half, ``"high"`` those
            of the second; the paper uses high for TruthfulQA and low elsewhere.
        relative_top: share of the highest probability, in [0, 1]; the paper's 0.1. 0 cuts nothing.

    Shapes: hidden states ``[B, N, C]``, logits ``[B, L, V]``.

    Raises:
        ConfigError: for a setting out of range.
        UnsupportedCall: for prompts padded on the right, static caches, models that return no logits of a
            causal decoder, and models that cap their logits.

    Cost: the head runs once more per candidate for every new token. There is no setting that changes
    nothing.
    """

    layers: str | tuple[int, ...] = "low"
    relative_top: float = 0.1

    name: ClassVar[str] = "dola"
    seams: ClassVar[tuple[str, ...]] = ("tokens", "logits")
    kinds: ClassVar[tuple[str, ...]] = ("self",)
    hosts: ClassVar[tuple[str, ...]] = ("transformers",)
    paper: ClassVar[str] = (
        "DoLa: Decoding by Contrasting Layers Improves Factuality in Large Language Models, "
        "arXiv 2309.03883"
    )
    observes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_layers(self.layers)
        fits = 0 <= self.relative_top <= 1
        require(fits, f"relative_top must be in [0, 1], got {self.relative_top}")

    def accepts(self, site: Site) -> str | None:
        """Decoder blocks before and after which a candidate can be read."""
        return reads(site, candidates(self.layers, site.depth))

    def enter(self, x: torch.Tensor, *, site: Site) -> torch.Tensor:
        """Keep layer 0."""
        if site.index == 0:
            keep(x, 0, site)
        return x

    def leave(self, x: torch.Tensor, *, site: Site) -> torch.Tensor:
        """Keep the hidden states after a block."""
        keep(x, site.index + 1, site)
        return x

    def logits(self, logits: torch.Tensor, *, site: Site) -> torch.Tensor:
        """The contrast, for the positions from which new tokens are drawn."""
        call = checked(site)
        newest = logits[:, -1:] if call.past == 0 else logits
        final = newest.float().log_softmax(-1)
        _, premature, layer = most_different(final, early(call, self.layers, newest, site))
        site.note("premature_layer", layer)
        kept = plausible(final, self.relative_top)

        def rule(_: torch.Tensor, premature: torch.Tensor) -> torch.Tensor:
            return (final - premature).masked_fill(~kept, -torch.inf)

        return contrast(logits, premature, rule, kept.new_ones(len(kept)))


def check_layers(layers: str | tuple[int, ...]) -> None:
    """Raise `ConfigError` unless `layers` is a bucket or layer numbers."""
    fits = layers in _BUCKETS if isinstance(layers, str) else bool(layers)
    fits = fits and (isinstance(layers, str) or all(type(i) is int for i in layers))
    require(fits, f"layers must be one of {_BUCKETS}, or layer numbers, got {layers!r}")


def candidates(layers: str | tuple[int, ...], depth: int, *, tied: bool = False) -> list[int]:
    """Numbers of the candidate layers of a decoder with `depth` blocks, ascending.

    Args:
        layers: as in `DoLa`.
        depth: number of blocks.
        tied: whether the head shares the embedding's weights, for the buckets.
    """
    if not isinstance(layers, str):
        return sorted({i + depth if i < 0 else i for i in layers})
    half = depth // 2
    low, high = range(0, half, 2), range(half + half % 2, depth, 2)
    chosen: Iterable[int] = low if layers == "low" else high
    if tied:
        chosen = [i for i in chosen if i] or [min(1, depth - 1)]
    return list(chosen) or [depth - 1]


def reads(site: Site, layers: list[int]) -> str | None:
    """None where `layers` can be read at this site, or the reason why not."""
    if "decoder" not in site.tags:
        return "it is not in a causal decoder"
    if site.token_module is None:
        return "no block around this attention is called with hidden states"
    beyond = [i for i in layers if not 0 <= i < site.depth]
    if beyond:
        return f"layers {beyond} are not among the {site.depth} from 0 to {site.depth - 1}"
    # Layer 1 stands in where a bucket has only layer 0 and the head is tied to it.
    wanted = {*layers, 1} if 0 in layers else set(layers)
    needed = site.index + 1 in wanted or (site.index == 0 and 0 in wanted)
    return None if needed else "its layer is not a candidate"


def keep(x: torch.Tensor, layer: int, site: Site) -> None:
    """Remember the hidden states of the positions whose logits may change, in the first stream."""
    if site.branch == 0:
        site.state[f"layer {layer}"] = x if site.layout.past else x[:, -1:].clone()


def early(
    call: ModelCall, layers: str | tuple[int, ...], newest: torch.Tensor, site: Site
) -> list[tuple[int, torch.Tensor]]:
    """Candidate layers and what the head makes of their newest positions, ``[B, m, V]``, in fp32.

    Raises:
        UnsupportedCall: when a candidate was not recorded in this call, or the head is not all of it.
    """
    module: Any = call.module
    head, embedding = module.get_output_embeddings(), module.get_input_embeddings()
    text = module.config.get_text_config()
    if head is None or getattr(text, "final_logit_softcapping", None) is not None:
        raise UnsupportedCall(
            f"{type(module).__name__} has no plain head from hidden states to logits, so the predictions "
            "of earlier layers are not known."
        )
    tied = embedding is not None and head.weight is embedding.weight
    found = []
    for layer in candidates(layers, len(call.decoder), tied=tied):
        memory = memory_of(call, max(layer - 1, 0), site)
        hidden = memory.pop(f"layer {layer}", None)
        if hidden is None:
            raise UnsupportedCall(
                f"Layer {layer} was not seen in this call. Attach to all decoder blocks, with sites=None."
            )
        # Rows that other methods added to the prompt come after its own.
        hidden = hidden[: newest.shape[0], -newest.shape[1] :]
        found.append((layer, head(hidden).float()))
    return found


def memory_of(call: ModelCall, index: int, site: Site) -> dict[str, Any]:
    """What the running method remembers at one decoder block, in the first stream."""
    block = call.decoder[index]
    if block.run is None:
        return {}
    return block.run.states_of(block, site.slot).get((0, 0), {})


def most_different(
    final: torch.Tensor, early: list[tuple[int, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The premature layer of each position.

    Args:
        final: log-probabilities of the last layer, ``[B, m, V]``.
        early: layers and their logits, ``[B, m, V]``; the first of equals wins.

    Returns:
        The divergence ``[B, m]``, the layer's log-probabilities ``[B, m, V]``, and its number ``[B, m]``.
    """
    best = premature = number = None
    for layer, logits in early:
        scores = logits.log_softmax(-1)
        mean = (final.exp() + scores.exp()) / 2
        logs = mean.clamp_min(torch.finfo(mean.dtype).tiny).log()
        divergence = (mean * (2 * logs - final - scores)).mean(-1) / 2
        if best is None or premature is None or number is None:
            best, premature = divergence, scores
            number = torch.full_like(divergence, float(layer))
            continue
        better = divergence > best
        best = torch.where(better, divergence, best)
        premature = torch.where(better[..., None], scores, premature)
        number = torch.where(better, float(layer), number)
    assert best is not None and premature is not None and number is not None
    return best, premature, number
