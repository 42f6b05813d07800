"""Triton kernels of attention over listed key tiles; block-sparse and routed attention launch them.

A list names key tiles. In block-sparse attention a tile is a part of a block, and where it lies follows
from the block's number. In routed attention chunks have any length, so tables say where a tile starts,
where its chunk ends, and which chunk it is; a word of bits per query says which chunks that query chose.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,type-arg,misc,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _keep(
    scores,
    rows,
    columns,
    stop,
    bits,
    word_at,
    owner,
    patterns,
    pattern,
    q_block: tl.constexpr,
    k_block: tl.constexpr,
    q_stop,
    BOUNDED: tl.constexpr,
    ROUTED: tl.constexpr,
    PATTERNS: tl.constexpr,
):
    """Set the scores of pairs that are not kept to -inf.

    `rows`, `word_at` and `columns` carry an axis of length 1 each, so that `scores` may be transposed.
    """
    if BOUNDED:
        scores = tl.where(columns < stop, scores, float("-inf"))
    if ROUTED:
        word = tl.load(bits + word_at + owner // 32, mask=rows < q_stop, other=0)
        scores = tl.where(((word >> (owner % 32)) & 1) != 0, scores, float("-inf"))
    if PATTERNS:
        # Rows and keys past the block wrap around; the rows are not stored and the keys are bounded.
        inside = (rows % q_block) * k_block + columns % k_block
        at = patterns + pattern.to(tl.int64) * (q_block * k_block)
        kept = tl.load(at + inside, mask=(pattern >= 0) & (inside >= 0), other=1)
        scores = tl.where(kept != 0, scores, float("-inf"))
    return scores


@triton.jit
def _place(
    i,
    list_at,
    tiles: tl.constexpr,
    BN: tl.constexpr,
    k_block: tl.constexpr,
    k_len,
    starts,
    stops,
    owners,
    pattern_of,
    pattern_at,
    ROUTED: tl.constexpr,
    PATTERNS: tl.constexpr,
):
    """First key, end, chunk and pattern of the i-th tile of a list."""
    owner = 0
    pattern = -1
    if ROUTED:
        tile = tl.load(list_at + i)
        start = tl.load(starts + tile)
        stop = tl.load(stops + tile)
        owner = tl.load(owners + tile)
    else:
        block = tl.load(list_at + i // tiles)
        start = block * k_block + (i % tiles) * BN
        stop = tl.minimum((block + 1) * k_block, k_len)
        if PATTERNS:
            pattern = tl.load(pattern_of + pattern_at + block)
    return start, stop, owner, pattern


@triton.jit
def _attend(
    acc0,
    acc1,
    mass,
    peak,
    q0,
    q1,
    k_desc,
    k_rest,
    v_desc,
    v_rest,
    batch,
    kv_head,
    start,
    stop,
    rows,
    q_stop,
    scale_log2,
    bits,
    word_at,
    owner,
    patterns,
    pattern,
    D0: tl.constexpr,
    D1: tl.constexpr,
    q_block: tl.constexpr,
    k_block: tl.constexpr,
    BN: tl.constexpr,
    BOUNDED: tl.constexpr,
    ROUTED: tl.constexpr,
    PATTERNS: tl.constexpr,
    UP: tl.constexpr,
    precision: tl.constexpr,
):
    """Let a tile of queries see one more tile of keys."""
    columns = start + tl.arange(0, BN)
    k0 = k_desc.load([batch, kv_head, start, 0]).reshape(BN, D0)
    if UP:
        k0 = k0.to(tl.float32)
    scores = tl.dot(q0, tl.trans(k0), input_precision=precision)
    if D1 > 0:
        k1 = k_rest.load([batch, kv_head, start, D0]).reshape(BN, D1)
        if UP:
            k1 = k1.to(tl.float32)
        scores = tl.dot(q1, tl.trans(k1), scores, input_precision=precision)
    scores = scores * scale_log2
    scores = _keep(
        scores, rows[:, None], columns[None, :], stop, bits, word_at[:, None], owner, patterns,
        pattern, q_block, k_block, q_stop, BOUNDED, ROUTED, PATTERNS,
    )  # fmt: skip
    new = tl.maximum(peak, tl.max(scores, 1))
    if ROUTED or PATTERNS:
        # A row that has kept nothing yet must not compute -inf minus -inf.
        safe = tl.where(new == float("-inf"), 0.0, new)
    else:
        safe = new
    weights = tl.exp2(scores - safe[:, None])
    fade = tl.exp2(peak - safe)
    mass = mass * fade + tl.sum(weights, 1)
    v0 = v_desc.load([batch, kv_head, start, 0]).reshape(BN, D0)
    if UP:
        v0 = v0.to(tl.float32)
    acc0 = tl.dot(weights.to(v0.dtype), v0, acc0 * fade[:, None], input_precision=precision)
    if D1 > 0:
        v1 = v_rest.load([batch, kv_head, start, D0]).reshape(BN, D1)
        if UP:
            v1 = v1.to(tl.float32)
        acc1 = tl.dot(weights.to(v1.dtype), v1, acc1 * fade[:, None], input_precision=precision)
    return acc0, acc1, mass, new


@triton.jit
def forward_kernel(
    q_desc,
    q_rest,
    k_desc,
    k_rest,
    v_desc,
    v_rest,
    out,
    lse,
    counts,
    indices,
    starts,
    stops,
    owners,
    bits,
    patterns,
    pattern_of,
    scale_log2,
    heads,
    q_len,
    k_len,
    q_blocks,
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
    D1: tl.constexpr,
    q_block: tl.constexpr,
    k_block: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BOUNDED: tl.constexpr,
    ROUTED: tl.constexpr,
    PATTERNS: tl.constexpr,
    UP: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """Output and LSE of one tile of queries of one head.

    BOUNDED: 0 when no listed tile reaches past its block, 1 when only the last of a list can, 2 when any
    can. D0 + D1 columns hold the head dimension in two boxes; D1 is 0 when one does.
    """
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

    list_row = batch * list_b + head * list_h + block
    count = tl.load(counts + list_row)
    list_at = indices + list_row.to(tl.int64) * most
    pattern_at = (batch * pattern_b + head * pattern_h + block).to(tl.int64) * k_blocks
    bh = (batch * heads + head).to(tl.int64)
    word_at = (bh * q_len + rows) * words
    total = count if ROUTED else count * tiles

    q0 = q_desc.load([batch, head, first, 0]).reshape(BM, D0)
    if UP:
        q0 = q0.to(tl.float32)
    if D1 > 0:
        q1 = q_rest.load([batch, head, first, D0]).reshape(BM, D1)
        if UP:
            q1 = q1.to(tl.float32)
        acc1 = tl.zeros((BM, D1), tl.float32)
    else:
        q1 = 0
        acc1 = 0
    acc0 = tl.zeros((BM, D0), tl.float32)
    peak = tl.full((BM,), float("-inf"), tl.float32)
    mass = tl.zeros((BM,), tl.float32)

    # Only the last block of a list can reach past the keys, so the others skip the comparison.
    last = tl.maximum(total - tiles, 0) if BOUNDED == 1 else total
    for i in range(0, last):
        start, stop, owner, pattern = _place(
            i, list_at, tiles, BN, k_block, k_len, starts, stops, owners, pattern_of, pattern_at,
            ROUTED, PATTERNS,
        )  # fmt: skip
        acc0, acc1, mass, peak = _attend(
            acc0, acc1, mass, peak, q0, q1, k_desc, k_rest, v_desc, v_rest, batch, head // GROUP,
            start, stop, rows, q_stop, scale_log2, bits, word_at, owner, patterns, pattern,
            D0, D1, q_block, k_block, BN, BOUNDED == 2, ROUTED, PATTERNS, UP, precision,
        )  # fmt: skip
    if BOUNDED == 1:
        for i in range(last, total):
            start, stop, owner, pattern = _place(
                i, list_at, tiles, BN, k_block, k_len, starts, stops, owners, pattern_of,
                pattern_at, ROUTED, PATTERNS,
            )  # fmt: skip
            acc0, acc1, mass, peak = _attend(
                acc0, acc1, mass, peak, q0, q1, k_desc, k_rest, v_desc, v_rest, batch,
                head // GROUP, start, stop, rows, q_stop, scale_log2, bits, word_at, owner,
                patterns, pattern, D0, D1, q_block, k_block, BN, True, ROUTED, PATTERNS, UP,
                precision,
            )  # fmt: skip

    full = tl.where(mass == 0.0, 1.0, mass)
    legal = rows < q_stop
    at = out + (bh * q_len + rows)[:, None] * D
    dims = tl.arange(0, D0)
    value = acc0 / full[:, None]
    tl.store(
        at + dims[None, :],
        value.to(out.dtype.element_ty),
        mask=legal[:, None] & (dims < D)[None, :],
    )
    if D1 > 0:
        dims1 = D0 + tl.arange(0, D1)
        value1 = acc1 / full[:, None]
        tl.store(
            at + dims1[None, :],
            value1.to(out.dtype.element_ty),
            mask=legal[:, None] & (dims1 < D)[None, :],
        )
    tl.store(lse + bh * q_len + rows, (peak + tl.log2(full)) * 0.6931471805599453, mask=legal)


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
            pattern, q_block, k_block, q_stop, BOUNDED, ROUTED, PATTERNS,
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
                q_stop, BOUNDED, ROUTED, PATTERNS,
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
