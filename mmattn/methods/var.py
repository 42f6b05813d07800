"""VAR: in heads that look at the image, move attention from sink tokens to the rest of the image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from mmattn_kernels import grouped_attention

from mmattn.errors import ConfigError, UnsupportedCall
from mmattn.methods import _decoder_keys as decoder
from mmattn.methods.base import Dense, Method, require
from mmattn.sites import Site

SINK_DIMS: dict[str, tuple[int, ...]] = {"vicuna-7b": (2533, 1415), "vicuna-13b": (2100, 4743)}
"""Published dimensions in which sink tokens stand out, by language model (LLaVA-1.5 and 1.6 use these)."""

_BY_SIZE = {4096: "vicuna-7b", 5120: "vicuna-13b"}
_REST, _TEXT_SINKS, _IMAGE_SINKS, _IMAGE = range(4)


@dataclass(frozen=True, kw_only=True)
class VAR(Method):
    """Takes attention from sink tokens and gives it to the image tokens that are no sinks.

    A few tokens, of the text and of the image, draw much attention whatever is asked; their hidden states
    stand out in a few fixed dimensions. Heads that look at the image beyond its sinks are image-centric,
    and in these the sinks' surplus is spread over the other image tokens, in proportion to the attention
    these have already. Rows still sum to one.

    Paper: "See What You Are Told: Visual Attention Sink in Large Multimodal Models", arXiv 2503.03321;
    compared there on general, hallucination and vision-centric benchmarks. Follows the arithmetic of the
    authors' code (seilk/VisAttnSink @98e62d6).

    Deviations from the code: sinks are found anew for every prompt, in every row (the code keeps those of
    the first prompt it saw and is for one row); 13B models have their own dimensions; the small number
    beside the image's attention grows with its tokens instead of standing for 576; attention is not
    rounded to fp16. From the paper: the gate asks for the sinks' share of a head's attention to the image
    to be low, where the paper asks for the others' share to be high, so thresholds are one minus each
    other; and the last block is changed too, as in the code.

    Args:
        dims: hidden dimensions that give sinks away. None takes those published for the language model
            (`SINK_DIMS`); for other models use ``discover_sink_dims(model)``.
        tau: how large such a dimension must be, in units of the root mean square of the token's hidden
            state, above 0; the code's 20. No token can exceed the square root of the hidden size, so
            small models need less.
        rho: largest share of the image's attention that its sinks may have in an image-centric head,
            in [0, 1); the code's 0.5.
        summ: smallest attention to the image of such a head, in [0, 1]; the code's 0.2.
        move_fraction: share of the sinks' attention that is moved, in [0, 1]. The code keeps 0.6, so 0.4.
            At 0 nothing is changed, bitwise.
        layers: decoder blocks, 0-based, negative from the end. None takes all but the first two of 32
            blocks; fewer blocks leave out their share, at least one.

    Shapes: hidden states ``[B, N, C]``, attention ``[B, H, Q, K]`` that is never held, groups ``[B, K]``.
    Only queries after the image are changed. In the report, ``gated`` is the share of image-centric heads
    and rows among those, ``moved`` the attention they moved, ``image_sinks`` and ``text_sinks`` tokens
    per row of the prompt.

    Raises:
        ConfigError: for a setting out of range.
        UnsupportedCall: for a cache whose prompt was not seen, and where image tokens are not known.
    """

    dims: tuple[int, ...] | None = None
    tau: float = 20.0
    rho: float = 0.5
    summ: float = 0.2
    move_fraction: float = 0.4
    layers: tuple[int, ...] | None = None

    name: ClassVar[str] = "var"
    seams: ClassVar[tuple[str, ...]] = ("attention", "tokens")
    kinds: ClassVar[tuple[str, ...]] = ("self",)
    hosts: ClassVar[tuple[str, ...]] = ("transformers",)
    needs: ClassVar[frozenset[str]] = frozenset({"image_tokens"})
    paper: ClassVar[str] = (
        "See What You Are Told: Visual Attention Sink in Large Multimodal Models, arXiv 2503.03321"
    )
    masks: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    grouped: ClassVar[bool] = True

    def __post_init__(self) -> None:
        dims = self.dims
        fits = dims is None or (bool(dims) and all(type(d) is int and d >= 0 for d in dims))
        require(fits, f"dims must be hidden dimensions, at least one, or None; got {dims!r}")
        require(self.tau > 0, f"tau must be above 0, got {self.tau}")
        require(0 <= self.rho < 1, f"rho must be in [0, 1), got {self.rho}")
        require(0 <= self.summ <= 1, f"summ must be in [0, 1], got {self.summ}")
        require(
            0 <= self.move_fraction <= 1,
            f"move_fraction must be in [0, 1], got {self.move_fraction}",
        )
        decoder.check_layers(self.layers)

    @property
    def passive(self) -> bool:
        """True when nothing is moved."""
        return self.move_fraction == 0

    def accepts(self, site: Site) -> str | None:
        """Decoder blocks among `layers` of a language model whose sink dimensions are known."""
        reason = decoder.refusal(site, self.chosen(site.depth), image=True)
        if reason is None and self.dims is None and _published(site.module) is None:
            return (
                "no sink dimensions are published for its language model; pass "
                "dims=discover_sink_dims(model) (mmattn.methods.var)"
            )
        if reason is None and site.token_module is None:
            return "the hidden states that enter its block cannot be reached"
        return reason

    def chosen(self, depth: int) -> set[int]:
        """Blocks of a decoder with `depth` of them."""
        if self.layers is not None:
            return decoder.from_end(self.layers, depth)
        return decoder.middle_layers(depth)

    def enter(self, x: torch.Tensor, *, site: Site) -> torch.Tensor:
        """Look for sinks among the tokens that enter the block; they pass unchanged."""
        if not self.passive:
            dims = self.dims if self.dims is not None else _published(site.module)
            assert dims is not None, "accepts() refused other sites"
            if max(dims) >= x.shape[-1]:
                raise ConfigError(
                    f"dims names dimension {max(dims)}, and hidden states at {site.path} have "
                    f"{x.shape[-1]}."
                )
            site.state["entering"] = standing_out(x.detach(), dims) > self.tau
        return x

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
        """Attention with the surplus of the sinks given to the image, after the image."""
        if self.passive:
            return dense(q, k, v)
        keys = decoder.read(q, k, mask, site)
        sinks = decoder.widen(self._sinks(keys, site), k.shape[2])
        starts = _image_end(keys.image)
        if keys.prompt:
            site.note("image_sinks", (sinks & keys.image).sum(1).float())
            site.note("text_sinks", (sinks & ~keys.image).sum(1).float())
        first = max(0, int(starts.min()) - keys.past)
        if not bool((sinks & keys.image).any()) or first >= keys.queries:
            return dense(q, k, v)
        at = torch.arange(first, keys.queries, device=q.device) + keys.past
        rows = (at >= starts[:, None]) & keys.real[:, first:]
        groups = torch.where(
            keys.image,
            torch.where(sinks, _IMAGE_SINKS, _IMAGE),
            torch.where(sinks, _TEXT_SINKS, _REST),
        )
        floor = keys.image.sum(1)[:, None, None] * 1e-6

        def multipliers(masses: torch.Tensor) -> torch.Tensor:
            _, text, own, others = masses.unbind(-1)
            image = own + others
            gated = (own / (image + floor) <= self.rho) & (image >= self.summ) & (others > 0)
            # A row without image sinks is left alone even where the text has some.
            gated &= (rows & (sinks & keys.image).any(1, keepdim=True))[:, None]
            moved = torch.where(gated, self.move_fraction * (text + own), 0.0)
            share = 1 - torch.where(gated, self.move_fraction, 0.0)
            gain = 1 + moved / torch.where(gated, others, 1.0)
            after = rows[:, None].expand_as(gated)
            if bool(after.any()):
                site.note("gated", gated[after].float())
            if bool(gated.any()):
                site.note("moved", moved[gated])
            return torch.stack([torch.ones_like(gain), share, share, gain], -1)

        changed = grouped_attention(
            q[:, :, first:],
            k,
            v,
            groups,
            multipliers,
            num_groups=4,
            mask=keys.rows(first),
            is_causal=keys.causal,
            scale=scale,
        )
        assert isinstance(changed, torch.Tensor)
        return torch.cat([dense(q, k, v)[:, :, :first], changed], 2) if first else changed

    def _sinks(self, keys: decoder.Keys, site: Site) -> torch.Tensor:
        """``[B, K]`` sinks among the tokens that were fed as a prompt; generated ones are none."""
        entering: torch.Tensor = site.state.pop("entering") & keys.real
        own = entering[: entering.shape[0] - site.layout.twins]
        if keys.prompt:
            site.state["sinks"] = own
            return entering
        kept: torch.Tensor | None = site.state.get("sinks")
        if kept is None or kept.shape[0] < own.shape[0] or kept.shape[1] > keys.past:
            raise UnsupportedCall(
                "VAR finds the sinks of a prompt while it is fed, and did not see the prompt of this "
                f"cache of {keys.past} tokens. Attach before the prompt."
            )
        kept = kept[: own.shape[0]]
        if keys.queries > 1:  # a later part of the prompt, or a second turn
            kept = torch.cat([decoder.widen(kept, keys.past), own], 1)
            site.state["sinks"] = kept
        return kept


def standing_out(x: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """How far tokens ``[B, N, C]`` stand out in `dims`: ``[B, N]``, in root mean squares."""
    x = x.float()
    size: torch.Tensor = (x.square().mean(-1) + 1e-6).sqrt()
    largest: torch.Tensor = x[..., list(dims)].abs().amax(-1) / size
    return largest


@dataclass(frozen=True, kw_only=True)
class _FirstToken(Method):
    """Keeps the hidden state of every row's first token at each block; changes nothing."""

    name: ClassVar[str] = "first-token"
    seams: ClassVar[tuple[str, ...]] = ("tokens",)
    kinds: ClassVar[tuple[str, ...]] = ("self",)
    hosts: ClassVar[tuple[str, ...]] = ("transformers",)
    observes: ClassVar[bool] = True

    def accepts(self, site: Site) -> str | None:
        return decoder.refusal(site, {site.index}, image=False)

    def enter(self, x: torch.Tensor, *, site: Site) -> torch.Tensor:
        site.state["entered"] = x.detach()[0].float()
        return x


def discover_sink_dims(
    model: Any,
    inputs: Mapping[str, Any] | None = None,
    *,
    tau: float = 20.0,
    most: int = 3,
) -> tuple[int, ...]:
    """The dimensions in which the first token of a language model stands out, for `VAR`.

    The first token (begin of text, in most models) is the surest sink. A dimension counts when it exceeds
    `tau` root mean squares there in at least half of the blocks; the largest come first.

    Args:
        model: a transformers model with a causal decoder.
        inputs: arguments of one call, row 0 is looked at; None feeds the begin-of-text token twice.
        tau: see `VAR`.
        most: how many dimensions to return at most.

    Returns:
        Dimensions, possibly none.

    Raises:
        NoSiteError: for a model without a causal decoder.
        ConfigError: when no begin-of-text token is known and `inputs` is None.
    """
    from mmattn.attaching import attach

    if inputs is None:
        config = model.config.get_text_config()
        start = config.bos_token_id if config.bos_token_id is not None else config.eos_token_id
        if not isinstance(start, int):
            raise ConfigError(
                "The config of the language model names no begin-of-text token; pass inputs= of a call."
            )
        device = next(model.parameters()).device
        inputs = {"input_ids": torch.full((1, 2), start, device=device)}
    mask = inputs.get("attention_mask")
    first = int(mask[0].int().argmax()) if isinstance(mask, torch.Tensor) else 0
    found = []
    with torch.no_grad(), attach(model, _FirstToken()) as session:
        model(**inputs)
        for run in session.runs:
            found += [run.state_of(site)["entered"][first] for site in run.sites]
    states = torch.stack([x.abs() / (x.square().mean() + 1e-6).sqrt() for x in found])
    often = (states > tau).float().mean(0) >= 0.5
    order = torch.argsort(states.mean(0), descending=True, stable=True)
    return tuple(int(d) for d in order if bool(often[d]))[:most]


def _published(module: torch.nn.Module) -> tuple[int, ...] | None:
    """`SINK_DIMS` of the LLaMA 2 models, told by their sizes: LLaMA 3 has a far larger vocabulary."""
    config = getattr(module, "config", None)
    if getattr(config, "model_type", None) != "llama" or getattr(config, "vocab_size", 0) > 33_000:
        return None
    name = _BY_SIZE.get(getattr(config, "hidden_size", 0))
    return SINK_DIMS[name] if name is not None else None


def _image_end(image: torch.Tensor) -> torch.Tensor:
    """``[B]``: the column after the last image token, 0 without any."""
    at = torch.arange(1, image.shape[1] + 1, device=image.device)
    return (image * at).amax(1)
