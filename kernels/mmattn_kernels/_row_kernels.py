"""Triton kernels of dense attention whose probabilities are looked at: by column, or by group of keys.

`_kernels.py` of other ops holds what belongs to one op; these serve `attention_with_column_mass` and
`grouped_attention`, whose first pass is the same.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,type-arg,misc,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _masked(
    scores,
    rows,
    columns,
    mask,
    mask_at,
    mask_q,
    mask_k,
    groups,
    group_at,
    q_len,
    k_len,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Scores in log2 units, hidden pairs at -inf. MASK: 0 none, 1 bool as bytes, 2 added."""
    inside = (rows < q_len)[:, None] & (columns < k_len)[None, :]
    if MASK > 0:
        at = mask + mask_at + rows.to(tl.int64)[:, None] * mask_q + columns[None, :] * mask_k
        if MASK == 1:
            visible = tl.load(at, mask=inside, other=0) != 0
            scores = tl.where(visible, scores, float("-inf"))
        else:
            added = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            scores = scores + added * 1.4426950408889634
    if CAUSAL:
        scores = tl.where(
            columns[None, :] <= (rows + (k_len - q_len))[:, None], scores, float("-inf")
        )
    group = tl.zeros_like(columns)
    if GROUPS > 0:
        group = tl.load(groups + group_at + columns, mask=columns < k_len, other=-1)
        scores = tl.where((group >= 0)[None, :], scores, float("-inf"))
    return tl.where((columns < k_len)[None, :], scores, float("-inf")), group


@triton.jit
def rows_kernel(
    q_desc,
    k_desc,
    v_desc,
    out,
    lse,
    masses,
    coefficients,
    mask,
    groups,
    scale_log2,
    heads,
    q_len,
    k_len,
    mask_b,
    mask_h,
    mask_q,
    mask_k,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GROUPS: tl.constexpr,
    VALUES: tl.constexpr,
    WEIGHED: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    UP: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """One tile of queries of one head.

    VALUES: also the output. GROUPS: how many groups there are, 0 for none. With WEIGHED the LSE is read
    and probabilities are multiplied by the coefficients of their groups; without it the LSE is written,
    and the masses of the groups if there are any.
    """
    precision: tl.constexpr = "tf32x3" if PRECISE else "tf32"
    tile = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    rows = tile * BM + tl.arange(0, BM)
    legal = rows < q_len
    bh = (batch * heads + head).to(tl.int64)
    row_at = bh * q_len + rows
    mask_at = batch.to(tl.int64) * mask_b + head.to(tl.int64) * mask_h
    group_at = batch.to(tl.int64) * k_len
    names = tl.arange(0, 8)

    q = q_desc.load([batch, head, tile * BM, 0]).reshape(BM, D0)
    if UP:
        q = q.to(tl.float32)
    acc = tl.zeros((BM, D0), tl.float32)
    peak = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    shares = tl.zeros((BM, 8), tl.float32)
    if WEIGHED:
        row_lse = tl.load(lse + row_at, mask=legal, other=float("inf")) * 1.4426950408889634
        # Probabilities of long rows are below the normal numbers of fp16: 2^8 lifts them, undone below.
        row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse) - 8.0
        factors = tl.load(
            coefficients + row_at[:, None] * GROUPS + names[None, :],
            mask=legal[:, None] & (names < GROUPS)[None, :],
            other=0.0,
        )
    end = k_len
    if CAUSAL:
        end = tl.minimum(k_len, tl.maximum(0, (tile + 1) * BM + k_len - q_len))
    for start in range(0, end, BN):
        columns = start + tl.arange(0, BN)
        k = k_desc.load([batch, head // GROUP, start, 0]).reshape(BN, D0)
        if UP:
            k = k.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision=precision) * scale_log2
        scores, group = _masked(
            scores, rows, columns, mask, mask_at, mask_q, mask_k, groups, group_at, q_len, k_len,
            MASK, CAUSAL, GROUPS,
        )  # fmt: skip
        if WEIGHED:
            weights = tl.exp2(scores - row_lse[:, None])
            for g in tl.static_range(GROUPS):
                factor = tl.sum(tl.where((names == g)[None, :], factors, 0.0), 1)
                weights = tl.where((group == g)[None, :], weights * factor[:, None], weights)
        else:
            new = tl.maximum(peak, tl.max(scores, 1))
            safe = tl.where(new == float("-inf"), 0.0, new)
            weights = tl.exp2(scores - safe[:, None])
            fade = tl.exp2(peak - safe)
            total = total * fade + tl.sum(weights, 1)
            peak = new
            if GROUPS > 0:
                shares = shares * fade[:, None]
                for g in tl.static_range(GROUPS):
                    part = tl.sum(tl.where((group == g)[None, :], weights, 0.0), 1)
                    shares += tl.where((names == g)[None, :], part[:, None], 0.0)
            if VALUES:
                acc = acc * fade[:, None]
        if VALUES:
            v = v_desc.load([batch, head // GROUP, start, 0]).reshape(BN, D0)
            if UP:
                v = v.to(tl.float32)
            acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=precision)

    if WEIGHED:
        acc = acc * 0.00390625
    else:
        full = tl.where(total == 0.0, 1.0, total)
        acc = acc / full[:, None]
        tl.store(lse + row_at, (peak + tl.log2(full)) * 0.6931471805599453, mask=legal)
        if GROUPS > 0:
            tl.store(
                masses + row_at[:, None] * GROUPS + names[None, :],
                shares / full[:, None],
                mask=legal[:, None] & (names < GROUPS)[None, :],
            )
    if VALUES:
        dims = tl.arange(0, D0)
        tl.store(
            out + row_at[:, None] * D + dims[None, :],
            acc.to(out.dtype.element_ty),
            mask=legal[:, None] & (dims < D)[None, :],
        )


@triton.jit
def columns_kernel(
    q_desc,
    k_desc,
    offset,
    mass,
    mask,
    scale_log2,
    heads,
    q_len,
    k_len,
    mask_b,
    mask_h,
    mask_q,
    mask_k,
    GROUP: tl.constexpr,
    D0: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    UP: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """Mass of one tile of keys of one head: a sum over all queries, in a fixed order, without atomics.

    ``offset = lse * log2(e) - log2(w)`` folds the weight of a query into its normaliser.
    """
    precision: tl.constexpr = "tf32x3" if PRECISE else "tf32"
    tile = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    columns = tile * BN + tl.arange(0, BN)
    bh = (batch * heads + head).to(tl.int64)
    mask_at = batch.to(tl.int64) * mask_b + head.to(tl.int64) * mask_h
    k = k_desc.load([batch, head // GROUP, tile * BN, 0]).reshape(BN, D0)
    if UP:
        k = k.to(tl.float32)
    seen = tl.zeros((BM, BN), tl.float32)
    begin = 0
    if CAUSAL:
        begin = tl.maximum(0, tile * BN - (k_len - q_len)) // BM * BM
    for start in range(begin, q_len, BM):
        rows = start + tl.arange(0, BM)
        q = q_desc.load([batch, head, start, 0]).reshape(BM, D0)
        if UP:
            q = q.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision=precision) * scale_log2
        scores, _ = _masked(
            scores, rows, columns, mask, mask_at, mask_q, mask_k, mask, 0, q_len, k_len,
            MASK, CAUSAL, 0,
        )  # fmt: skip
        row_offset = tl.load(offset + bh * q_len + rows, mask=rows < q_len, other=float("inf"))
        seen += tl.exp2(scores - row_offset[:, None])
    tl.store(mass + bh * k_len + columns, tl.sum(seen, 0), mask=columns < k_len)
