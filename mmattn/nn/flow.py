"""Flow-Attention: linear attention as a flow of fixed amount from keys to queries.

Sigmoid features of queries (sinks) and keys (sources) are the capacities of a network. Holding what every
source sends at one, sinks receive different amounts, which decide how much of the result they keep; holding
what every sink receives at one, sources compete for the right to send, by a softmax over keys. This brings
back the sharpness that linear attention lacks, without a softmax over pairs. "Flowformer: Linearizing
Transformers with Conservation Flows", arXiv 2202.06258. Compared with numbers of the published layer, both
forms, and in tests with sums written out.

Deviations: flows are computed in fp32 for half-precision inputs. The causal form works on chunks of 64
tokens; the published code keeps a matrix per token. Neither form has a place for a mask.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from mmattn_kernels import linear_attention
from torch import Tensor, nn

from mmattn.errors import ConfigError, UnsupportedCall

__all__ = ["FlowAttention", "FlowSelfAttention", "Flows", "flow_attention", "flows"]

_CHUNK = 64


class Flows(NamedTuple):
    """What runs through the network, per head.

    Args:
        incoming: of every query when keys send what their features allow, ``[B, H, N]``.
        outgoing: of every key, the same way, ``[B, H, M]``.
        conserved_incoming: of every query when every key sends one unit; all sum to M.
        conserved_outgoing: of every key when every query receives one unit; all sum to N.
    """

    incoming: Tensor
    outgoing: Tensor
    conserved_incoming: Tensor
    conserved_outgoing: Tensor


def flows(q: Tensor, k: Tensor, *, causal: bool = False, eps: float = 1e-6) -> Flows:
    """The flows between sigmoid features ``q [B, H, N, D]`` and ``k [B, H, M, D]``.

    With `causal`, query i and key i know tokens up to i only, and what they conserve is an average over
    those tokens.
    """

    def through(x: Tensor, others: Tensor) -> Tensor:
        total = others.cumsum(2) if causal else others.sum(2, keepdim=True)
        return ((x + eps) * (total + eps)).sum(-1)

    incoming, outgoing = through(q, k), through(k, q)
    seen = torch.arange(1, q.shape[2] + 1, device=q.device, dtype=q.dtype) if causal else 1.0
    return Flows(
        incoming,
        outgoing,
        through(q, k * (seen / outgoing)[..., None]) / seen,
        through(k, q * (seen / incoming)[..., None]) / seen,
    )


def flow_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, eps: float = 1e-6
) -> Tensor:
    """Flow-Attention in time and memory linear in the tokens; there is no scale of scores.

    Args:
        q: queries ``[B, H, N, D]``, before the sigmoid.
        k: keys ``[B, H, M, D]``.
        v: values ``[B, H, M, Dv]``.
        causal: query i sees keys up to i; needs N = M.
        eps: added to both factors of every product of features, above 0.

    Returns:
        Output ``[B, H, N, Dv]`` in the dtype of `v`.

    Raises:
        ConfigError: `causal` with queries and keys that differ in number.
    """
    n, m = q.shape[2], k.shape[2]
    if causal and n != m:
        raise ConfigError(
            f"flow_attention: {n} queries and {m} keys; causal needs as many of each."
        )
    work = torch.float64 if v.dtype == torch.float64 else torch.float32
    sinks, sources, values = q.to(work).sigmoid(), k.to(work).sigmoid(), v.to(work)
    flow = flows(sinks, sources, causal=causal, eps=eps)
    sinks = sinks / flow.incoming[..., None]
    outgoing = flow.conserved_outgoing.clamp(-1.0, 1.0)
    if causal:
        share = outgoing.exp()
        seen = torch.arange(1, n + 1, device=q.device, dtype=work)
        competition = share * seen / share.cumsum(-1)
        allocation = flow.conserved_incoming.sigmoid()
        out = _causal_product(sinks, sources, values * competition[..., None])
    else:
        competition = outgoing.softmax(-1) * m
        allocation = (flow.conserved_incoming * (n / m)).sigmoid()
        out = linear_attention(
            sinks,
            sources,
            values * competition[..., None],
            feature_map="identity",
            normalizer="none",
        )
    return (out * allocation[..., None]).to(v.dtype)


def _causal_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``out_i = q_i . sum_{j <= i} k_j v_j``; plain torch, since our linear attention is not causal.

    Inside a chunk as masked scores, across chunks through the state of all chunks before.
    """
    n = q.shape[2]
    pad = -n % _CHUNK
    q, k, v = (nn.functional.pad(x, (0, 0, 0, pad)).unflatten(2, (-1, _CHUNK)) for x in (q, k, v))
    states = k.transpose(-1, -2) @ v
    before = states.cumsum(2) - states
    inside = (q @ k.transpose(-1, -2)).tril() @ v
    return (inside + q @ before).flatten(2, 3)[:, :, :n]


class FlowAttention(nn.Module):
    """Multi-head Flow-Attention with separate projections, for self- and cross-attention.

    Args:
        d_input: channels of queries, keys and values.
        d_model: channels of all heads.
        d_output: channels of the result.
        n_heads: heads; divides `d_model`.
        drop_out: dropout of the result, 0 to 1.
        causal: tokens see those up to themselves.
        eps: as in `flow_attention`.

    Shapes:
        ``queries [B, N, d_input]``, ``keys`` and ``values [B, M, d_input]`` to ``[B, N, d_output]``. State
        dicts of the published layer load as they are.

    Raises:
        ConfigError: heads that do not divide `d_model`.
    """

    def __init__(
        self,
        d_input: int,
        d_model: int,
        d_output: int,
        n_heads: int,
        drop_out: float = 0.05,
        causal: bool = False,
        eps: float = 1e-6,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if d_model % n_heads:
            raise ConfigError(f"FlowAttention: {n_heads} heads do not divide d_model {d_model}.")
        dd = {"device": device, "dtype": dtype}
        self.n_heads = n_heads
        self.causal = causal
        self.eps = eps
        self.query_projection = nn.Linear(d_input, d_model, **dd)
        self.key_projection = nn.Linear(d_input, d_model, **dd)
        self.value_projection = nn.Linear(d_input, d_model, **dd)
        self.out_projection = nn.Linear(d_model, d_output, **dd)
        self.dropout = nn.Dropout(drop_out)

    def forward(
        self, queries: Tensor, keys: Tensor | None = None, values: Tensor | None = None
    ) -> Tensor:
        """Self-attention with `queries` alone; `values` are `keys` where they are not given."""
        keys = queries if keys is None else keys
        values = keys if values is None else values
        q, k, v = (
            x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for x in (
                self.query_projection(queries),
                self.key_projection(keys),
                self.value_projection(values),
            )
        )
        out = flow_attention(q, k, v, causal=self.causal, eps=self.eps)
        result: Tensor = self.dropout(self.out_projection(out.transpose(1, 2).flatten(2)))
        return result


class FlowSelfAttention(nn.Module):
    """Flow-Attention with one projection for queries, keys and values, as image models have it.

    Has the parameters of timm's attention (``qkv``, ``proj``) and can stand where that does, to be trained.

    Args:
        dim: channels.
        num_heads: heads; divides `dim`.
        qkv_bias: whether queries, keys and values have a bias.
        proj_drop: dropout of the result, 0 to 1.

    Shapes:
        ``x [B, N, C]`` to the same.

    Raises:
        ConfigError: heads that do not divide the channels.
        UnsupportedCall: a mask.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ConfigError(f"FlowSelfAttention: {num_heads} heads do not divide dim {dim}.")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if attn_mask is not None:
            raise UnsupportedCall(
                "FlowSelfAttention: a mask was given; flows are defined without one."
            )
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = flow_attention(*qkv.unbind(0), causal=is_causal)
        result: Tensor = self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))
        return result
