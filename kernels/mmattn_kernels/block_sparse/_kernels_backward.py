"""Triton kernels of the gradients of attention over listed key tiles."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,type-arg,misc,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from mmattn_kernels.block_sparse._kernels import _keep, _place


@triton.jit
def backward_queries_kernel(
    q_desc,
    k_desc,
    v_desc,
    grad_desc,
    lse,
    delta,
    dq,
    counts,
    indices,
    starts,
    stops,
    owners,
    bits,
    patterns,
    pattern_of,
    spans,
    codes,
    whole,
    scale,
    heads,
    q_len,
    k_len,
    list_b,
    list_h,
    pattern_b,
    pattern_h,
    most,
    k_blocks,
    words,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    q_block: tl.constexpr,
    k_block: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BOUNDED: tl.constexpr,
    ROUTED: tl.constexpr,
    PATTERNS: tl.constexpr,
    WINDOW: tl.constexpr,
    UP: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """Gradient of one tile of queries. `lse` is in units of log 2, and +inf for rows without keys."""
    precision: tl.constexpr = "tf32x3" if PRECISE else "tf32"
    per_block: tl.constexpr = (q_block + BM - 1) // BM
    tiles: tl.constexpr = (k_block + BN - 1) // BN
    tile = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    block = tile // per_block
    first = block * q_block + (tile % per_block) * BM
    rows = first + tl.arange(0, BM)
    q_stop = tl.minimum((block + 1) * q_block, q_len)
    legal = rows < q_stop

    list_row = batch * list_b + head * list_h + block
    count = tl.load(counts + list_row)
    list_at = indices + list_row.to(tl.int64) * most
    pattern_at = (batch * pattern_b + head * pattern_h + block).to(tl.int64) * k_blocks
    bh = (batch * heads + head).to(tl.int64)
    word_at = (bh * q_len + rows) * words
    total = count if ROUTED else count * tiles

    q = q_desc.load([batch, head, first, 0]).reshape(BM, D0)
    grad = grad_desc.load([batch, head, first, 0]).reshape(BM, D0)
    if UP:
        q = q.to(tl.float32)
        grad = grad.to(tl.float32)
    row_lse = tl.load(lse + bh * q_len + rows, mask=legal, other=float("inf"))
    row_delta = tl.load(delta + bh * q_len + rows, mask=legal, other=0.0)
    acc = tl.zeros((BM, D0), tl.float32)
    for i in range(0, total):
        start, stop, owner, pattern = _place(
            i, list_at, tiles, BN, k_block, k_len, starts, stops, owners, pattern_of, pattern_at,
            ROUTED, PATTERNS,
        )  # fmt: skip
        columns = start + tl.arange(0, BN)
        k = k_desc.load([batch, head // GROUP, start, 0]).reshape(BN, D0)
        v = v_desc.load([batch, head // GROUP, start, 0]).reshape(BN, D0)
        if UP:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision=precision) * (scale * 1.4426950408889634)
        scores = _keep(
            scores, rows[:, None], columns[None, :], stop, bits, word_at[:, None], owner, patterns,
            pattern, q_block, k_block, q_stop, spans, codes, q_len, k_len, BOUNDED, ROUTED, PATTERNS,
            WINDOW,
        )  # fmt: skip
        weights = tl.exp2(scores - row_lse[:, None])
        slope = tl.dot(grad, tl.trans(v), input_precision=precision)
        slope = weights * (slope - row_delta[:, None])
        acc = tl.dot(slope.to(k.dtype), k, acc, input_precision=precision)
    dims = tl.arange(0, D0)
    tl.store(
        dq + (bh * q_len + rows)[:, None] * D + dims[None, :],
        (acc * scale).to(dq.dtype.element_ty),
        mask=legal[:, None] & (dims < D)[None, :],
    )


@triton.jit
def backward_keys_kernel(
    q_desc,
    k_desc,
    v_desc,
    grad_desc,
    lse,
    delta,
    dk,
    dv,
    counts,
    indices,
    starts,
    stops,
    owners,
    bits,
    patterns,
    pattern_of,
    spans,
    codes,
    whole,
    scale,
    heads,
    q_len,
    k_len,
    list_b,
    list_h,
    pattern_b,
    pattern_h,
    most,
    k_blocks,
    words,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    q_block: tl.constexpr,
    k_block: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BOUNDED: tl.constexpr,
    ROUTED: tl.constexpr,
    PATTERNS: tl.constexpr,
    WINDOW: tl.constexpr,
    UP: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """Gradients of one tile of keys and values, over the reversed lists of the heads that share them."""
    precision: tl.constexpr = "tf32x3" if PRECISE else "tf32"
    per_block: tl.constexpr = (q_block + BM - 1) // BM
    tiles: tl.constexpr = (k_block + BN - 1) // BN
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    batch = tl.program_id(2)
    owner = 0
    if ROUTED:
        block = tile
        start = tl.load(starts + tile)
        stop = tl.load(stops + tile)
        owner = tl.load(owners + tile)
    else:
        block = tile // tiles
        start = block * k_block + (tile % tiles) * BN
        stop = tl.minimum((block + 1) * k_block, k_len)
    columns = start + tl.arange(0, BN)
    k = k_desc.load([batch, kv_head, start, 0]).reshape(BN, D0)
    v = v_desc.load([batch, kv_head, start, 0]).reshape(BN, D0)
    if UP:
        k = k.to(tl.float32)
        v = v.to(tl.float32)
    acc_k = tl.zeros((BN, D0), tl.float32)
    acc_v = tl.zeros((BN, D0), tl.float32)
    for member in range(0, GROUP):
        head = kv_head * GROUP + member
        list_row = batch * list_b + head * list_h + block
        count = tl.load(counts + list_row)
        list_at = indices + list_row.to(tl.int64) * most
        bh = (batch * heads + head).to(tl.int64)
        for i in range(0, count * per_block):
            q_number = tl.load(list_at + i // per_block)
            first = q_number * q_block + (i % per_block) * BM
            rows = first + tl.arange(0, BM)
            q_stop = tl.minimum((q_number + 1) * q_block, q_len)
            legal = rows < q_stop
            pattern = -1
            if PATTERNS:
                pattern_at = (batch * pattern_b + head * pattern_h + q_number).to(tl.int64)
                pattern = tl.load(pattern_of + pattern_at * k_blocks + block)
            q = q_desc.load([batch, head, first, 0]).reshape(BM, D0)
            grad = grad_desc.load([batch, head, first, 0]).reshape(BM, D0)
            if UP:
                q = q.to(tl.float32)
                grad = grad.to(tl.float32)
            row_lse = tl.load(lse + bh * q_len + rows, mask=legal, other=float("inf"))
            row_delta = tl.load(delta + bh * q_len + rows, mask=legal, other=0.0)
            # Transposed, so that the probabilities are the left operand of the next product as they
            # are, and the tile has enough rows for the tensor cores however few queries it holds.
            scores = tl.dot(k, tl.trans(q), input_precision=precision)
            scores = scores * (scale * 1.4426950408889634)
            scores = _keep(
                scores, rows[None, :], columns[:, None], stop, bits,
                ((bh * q_len + rows) * words)[None, :], owner, patterns, pattern, q_block, k_block,
                q_stop, spans, codes, q_len, k_len, BOUNDED, ROUTED, PATTERNS, WINDOW,
            )  # fmt: skip
            weights = tl.exp2(scores - row_lse[None, :])
            acc_v = tl.dot(weights.to(grad.dtype), grad, acc_v, input_precision=precision)
            slope = tl.dot(v, tl.trans(grad), input_precision=precision)
            slope = weights * (slope - row_delta[None, :])
            acc_k = tl.dot(slope.to(q.dtype), q, acc_k, input_precision=precision)
    dims = tl.arange(0, D0)
    kv_heads = heads // GROUP
    at = ((batch * kv_heads + kv_head).to(tl.int64) * k_len + columns)[:, None] * D + dims[None, :]
    kept = (columns < stop)[:, None] & (dims < D)[None, :]
    tl.store(dk + at, (acc_k * scale).to(dk.dtype.element_ty), mask=kept)
    tl.store(dv + at, acc_v.to(dv.dtype.element_ty), mask=kept)
