"""FlashBias: a dense attention bias becomes a few extra channels of the query and the key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmattn.errors import UnsupportedCall
from mmattn.methods._calls import run_dense
from mmattn.methods.base import Dense, Method, require
from mmattn.sites import Site

_MASKING = 30.0
"""A score this far below the largest of its query is a mask: exp(-30) vanishes beside 1 in fp32."""


class Factors(NamedTuple):
    """Low-rank form of a bias: ``bias[q, k] = sum_r query[q, r] * key[k, r] + anything of q alone``.

    Args:
        query: ``[U, H, Q, R]``, U different biases.
        key: ``[U, H, K, R]``.
        rank: ``[U, H]`` ranks before padding to R.
        error: ``[U]`` largest absolute difference from the bias, up to what the softmax cancels.
    """

    query: Tensor
    key: Tensor
    rank: Tensor
    error: Tensor


def alibi(slopes: Tensor, queries: int, keys: int) -> Factors:
    """Factors of ALiBi's ``-slope * (i - j)``, rank 1 because the term in `i` cancels in the softmax.

    Positions are counted from the middle, which halves the largest number a half-precision key holds.

    Args:
        slopes: ``[H]``, positive for keys that fade with distance into the past.
        queries, keys: lengths.
    """
    position = torch.arange(keys, dtype=slopes.dtype, device=slopes.device) - (keys - 1) / 2
    query = slopes[None, :, None, None].expand(1, -1, queries, 1)
    key = position[None, None, :, None].expand(1, slopes.shape[0], keys, 1)
    rank = torch.ones(1, slopes.shape[0], dtype=torch.long, device=slopes.device)
    return Factors(query, key, rank, slopes.new_zeros(1))


@torch.no_grad()
def factorise(
    bias: Tensor,
    *,
    energy: float = 0.995,
    max_error: float | None = None,
    most: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Factors:
    """Truncated singular value decomposition of every head's bias, after removing its mean over keys.

    Args:
        bias: ``[U, H, Q, K]``, finite.
        energy: share of the squared singular values to keep, in (0, 1]; unused with `max_error`.
        max_error: instead, the smallest rank whose largest absolute error is at most this.
        most: ranks above this are not looked for; they are returned as ``most + 1``.
        dtype: of the factors; the error is measured after rounding to it.
    """
    centred = bias.double()
    centred = centred - centred.mean(-1, keepdim=True)
    queries, keys = centred.shape[-2:]
    full = min(queries, keys)
    limit = full if most is None else min(most, full)
    if bool((centred - centred[..., :1, :]).abs().max() <= 1e-6 * centred.abs().max()):
        # Every query sees the same bias (ALiBi, key biases): rank 1 without a decomposition.
        key = centred[..., :1, :].transpose(-1, -2)
        query = torch.ones_like(centred[..., :1])
        rank = (key.abs().amax((-1, -2)) > 0).long()
        return _rounded(centred, query, key, rank, dtype)
    # The Gram matrix in double precision: several times faster than an SVD, and exact enough for fp32.
    squares, vectors = torch.linalg.eigh(centred.mT @ centred)
    squares, vectors = squares.flip(-1).clamp_min(0), vectors.flip(-1)
    squares, vectors = squares[..., :full], vectors[..., :full]
    floor = squares[..., :1] * 1e-15
    squares = torch.where(squares > floor, squares, 0.0)
    root = squares.pow(0.25)
    key = vectors * root[..., None, :]
    query = centred @ vectors * torch.where(root > 0, 1 / root, 0.0)[..., None, :]
    if max_error is None:
        total = squares.sum(-1, keepdim=True)
        missing = 1 - squares.cumsum(-1) / total.clamp_min(torch.finfo(total.dtype).tiny)
        rank = (missing > 1 - energy + 1e-15).sum(-1) + 1
        rank = torch.where(total[..., 0] > 0, rank, 0)
    else:
        rank = torch.full_like(squares[..., 0], limit + 1, dtype=torch.long)
        rest = centred.clone()
        for r in range(limit + 1):
            good = rest.abs().amax((-1, -2)) <= max_error
            rank = torch.where(good & (rank > r), r, rank)
            if r == limit or bool((rank <= r).all()):
                break
            rest -= query[..., r : r + 1] @ key[..., r : r + 1].mT
    width = max(1, min(int(rank.max()), limit))
    used = torch.arange(width, device=bias.device) < rank[..., None]
    query = query[..., :width] * used[..., None, :]
    key = key[..., :width] * used[..., None, :]
    return _rounded(centred, query, key, rank.clamp_max(limit + 1), dtype)


def _rounded(
    centred: Tensor, query: Tensor, key: Tensor, rank: Tensor, dtype: torch.dtype
) -> Factors:
    query, key = query.to(dtype), key.to(dtype)
    error = (centred - query.double() @ key.double().mT).abs().amax((1, 2, 3))
    return Factors(query, key, rank, error)


def with_factors(
    q: Tensor, k: Tensor, v: Tensor, query: Tensor, key: Tensor, scale: float | None, dense: Dense
) -> Tensor:
    """``softmax(scale * q k^T + query key^T) v`` by one attention without a mask.

    The head dimension grows to the next multiple of 8 above ``D + R``, and `v` is padded with it, as the
    fused kernels want equal widths.

    Shapes:
        ``q [B, H, Q, D]``, ``k, v [B, H, K, D]``, ``query [B or 1, H or 1, Q, R]``, ``key`` likewise
        -> ``[B, H, Q, D]``.
    """
    width = q.shape[-1] + query.shape[-1]
    wide = -(-max(width, v.shape[-1]) // 8) * 8
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    q = torch.cat([q, query.expand(*q.shape[:-1], -1)], dim=-1)
    k = torch.cat([k, key.expand(*k.shape[:-1], -1)], dim=-1)
    out = dense(
        pad(q, (0, wide - width)),
        pad(k, (0, wide - width)),
        pad(v, (0, wide - v.shape[-1])),
        mask=None,
        scale=1.0,
    )
    return out[..., : v.shape[-1]]


@dataclass(frozen=True)
class FlashBias(Method):
    """Low-rank attention bias inside an attention call that needs no mask.

    A bias ``b = f g^T`` of rank R adds to the scores what R more channels of query and key would add, so
    ``softmax(s q k^T + b) v`` is one plain attention over ``[s q | f]`` and ``[k | g]``, and the Q x K bias
    need not be read by it. "FlashBias: Fast Computation of Attention with Bias" (arXiv 2505.12044). Exact
    for ALiBi, rank 1; the learned tables of BEiT, Swin and relative-position ViTs are cut off by singular
    values. Sites: attention that hands SDPA an additive mask. timm's Swin does so while a method is
    attached; SwinV2 computes the softmax by itself and is no site. Compared with SDPA on the dense bias,
    and with random factors of equal rank.

    A host's bias is a new tensor in every call, so factors are kept with a copy of the bias they came from
    and recomputed as soon as a value differs; the copy and the host's own gather cost memory and time that
    the paper's stored factors do not. Under `torch.compile` the factors of the last eager call serve, and
    the graph asserts that the bias is still the same. On a CPU the fused kernel reads the
    bias at little cost: one core ran attention calls with factors between as fast and 1.6 times as slow as
    with the dense bias, so there the method is for studying biases. The authors' gains are on GPUs. On a
    smooth table the default `energy` changed outputs by 3 to 5 %, ``max_error=0.01`` by 0.2 % or less.

    Deviations: the mean over keys is removed first, because the softmax ignores it, and `energy` counts
    only the rest. Rows (Swin's windows) that contain a mask instead of a bias, or need more than
    `max_rank`, run dense and are counted; in Swin these are the windows cut by the shift. The learned
    factors of pair representations are not implemented.

    Args:
        energy: share of the squared singular values that every head keeps, in (0, 1]; 0.995 in the paper.
        max_error: instead of `energy`, the largest absolute error of the bias in nats, > 0. The output then
            changes by at most ``exp(2 * max_error) - 1`` times the largest value.
        max_rank: biases that need more than this stay dense, >= 1; 16 in the paper.

    Shapes:
        mask ``[B or 1, H or 1, Q or 1, K]``, floating point.

    Raises:
        UnsupportedCall: no mask, a boolean mask, a bias that needs a gradient, or a compiled call without
            an eager one before.
    """

    name: ClassVar[str] = "flashbias"
    kinds: ClassVar[tuple[str, ...]] = ("self", "window")
    hosts: ClassVar[tuple[str, ...]] = ("timm", "torch")
    paper: ClassVar[str] = "FlashBias: Fast Computation of Attention with Bias, arXiv 2505.12044"
    masks: ClassVar[bool] = True
    causal: ClassVar[bool] = True

    energy: float = 0.995
    max_error: float | None = None
    max_rank: int = 16

    def __post_init__(self) -> None:
        """Check the knobs."""
        require(0 < self.energy <= 1, f"energy is a share in (0, 1], got {self.energy}")
        require(
            self.max_error is None or self.max_error > 0,
            f"max_error must be positive or None, got {self.max_error}",
        )
        require(self.max_rank >= 1, f"max_rank must be at least 1, got {self.max_rank}")

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None,
        scale: float | None,
        site: Site,
        dense: Dense,
    ) -> Tensor:
        """Factorise the bias, or take the factors of an equal one, and attend without a mask."""
        if mask is None or not mask.is_floating_point():
            raise UnsupportedCall(
                "FlashBias found no additive bias in this attention call"
                + (f"; its mask is {mask.dtype}." if mask is not None else ".")
                + " Choose sites whose attention has one (BEiT, Swin, relative-position ViTs)."
            )
        if torch.is_grad_enabled() and mask.requires_grad:
            raise UnsupportedCall(
                "FlashBias would cut the gradient of this attention bias. Run under torch.no_grad(), or "
                "freeze the bias table."
            )
        bias = mask if mask.ndim == 4 else mask[(None,) * (4 - mask.ndim)]
        kept = self._kept(bias, q.dtype, site)
        if kept["share"] == 0.0:
            return run_dense(q, k, v, site=site, dense=dense, reason=kept["reason"])
        site.note("rank", kept["rank"])
        site.note("bias_error", kept["error"])
        site.note("low_rank_rows", kept["share"])
        query, key, of = kept["query"], kept["key"], kept["of"]
        if kept["share"] == 1.0:
            if of is not None:
                query, key = query[of], key[of]
            return with_factors(q, k, v, query, key, scale, dense)
        site.meter.fell_back(kept["reason"])
        low, high = kept["low"], kept["high"]
        few, out = of[low], torch.empty_like(q)
        out[low] = with_factors(q[low], k[low], v[low], query[few], key[few], scale, dense)
        out[high] = dense(q[high], k[high], v[high], mask=bias[high])
        return out

    def _kept(self, bias: Tensor, dtype: torch.dtype, site: Site) -> dict[str, Any]:
        """What is known about this bias, from the site's state if its values are those of the last call."""
        state = site.state
        old: Any = state.get("bias")
        fits = old is not None and old.shape == bias.shape and state["query"].dtype == dtype
        if torch.compiler.is_compiling():
            if not fits:
                raise UnsupportedCall(
                    "FlashBias factorises the bias outside compiled graphs: run the model once before "
                    "compiling it, with the same input size."
                )
            torch._assert_async(
                torch.all(torch.eq(old, bias)),
                "The attention bias changed after FlashBias factorised it.",
            )
            return state
        if fits and torch.equal(old, bias):
            return state
        state.clear()
        state.update(self._factors(bias.detach(), dtype), bias=bias.detach().clone())
        if state["share"]:
            site.remark(
                f"rank {state['rank']:.0f} of {min(bias.shape[-2:])} for a bias of {bias.shape[1]} heads, "
                f"largest error {state['error']:.2g}"
            )
        return state

    def _factors(self, bias: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        """Factorise every different row of ``[B or 1, H or 1, Q or 1, K]`` once."""
        rows, of = bias, None
        if bias.shape[0] > 1:
            flat, of = torch.unique(bias.flatten(1), dim=0, return_inverse=True)
            rows = flat.view(-1, *bias.shape[1:])
        masks = _hides_keys(rows)
        factors = factorise(
            rows.masked_fill(masks[:, None, None, None], 0.0),
            energy=self.energy,
            max_error=self.max_error,
            most=self.max_rank,
            dtype=dtype,
        )
        low = ~masks & (factors.rank <= self.max_rank).all(-1)
        chosen = low if of is None else low[of]
        share = float(chosen.float().mean())
        why = "some rows hide keys" if bool(masks.any()) else f"needs a rank above {self.max_rank}"
        return {
            "query": factors.query,
            "key": factors.key,
            "of": of,
            "share": share,
            "low": chosen.nonzero()[:, 0],
            "high": (~chosen).nonzero()[:, 0],
            "rank": float(factors.rank[low].max()) if share else 0.0,
            "error": float(factors.error[low].max()) if share else 0.0,
            "reason": f"the bias is no low-rank one ({why})",
        }


def _hides_keys(rows: Tensor) -> Tensor:
    """Which of ``[U, H, Q, K]`` switch keys off for some queries and not for others: ``[U]``."""
    best = rows.amax(-1, keepdim=True)
    deep = (rows - best < -_MASKING).flatten(1).any(1)
    centred = rows - rows.mean(-1, keepdim=True)
    alike = (centred - centred[..., :1, :]).abs().flatten(1).amax(1)
    # A comparison with NaN is False: infinite entries are masks even where all queries share them.
    return deep & ~(alike <= 1e-5 * centred.abs().flatten(1).amax(1))
