"""Triton kernels of attention over listed key tiles; block-sparse and routed attention launch them.

A list names key tiles. In block-sparse attention a tile is a part of a block, and where it lies follows
from the block's number. In routed attention chunks have any length, so tables say where a tile starts,
where its chunk ends, and which chunk it is; a word of bits per query says which chunks that query chose.
In neighborhood attention tokens lie in tiles of the grid; per axis, tables say what a query sees and
where a key is, and the tiles that a list names first are seen whole.
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
    spans,
    codes,
    q_len,
    k_len,
    BOUNDED: tl.constexpr,
    ROUTED: tl.constexpr,
    PATTERNS: tl.constexpr,
    WINDOW: tl.constexpr,
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
    for axis in tl.static_range(WINDOW):
        low = tl.load(spans + 2 * axis * q_len + rows, mask=rows < q_stop, other=0)
        high = tl.load(spans + (2 * axis + 1) * q_len + rows, mask=rows < q_stop, other=0)
        code = tl.load(codes + axis * k_len + columns)
        # -2 marks keys outside the grid, which everybody sees.
        seen = ((code >= low) & (code <= high)) | (code == -2)
        scores = tl.where(seen, scores, float("-inf"))
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
    spans,
    codes,
    q_len,
    k_len,
    D0: tl.constexpr,
    D1: tl.constexpr,
    q_block: tl.constexpr,
    k_block: tl.constexpr,
    BN: tl.constexpr,
    BOUNDED: tl.constexpr,
    ROUTED: tl.constexpr,
    PATTERNS: tl.constexpr,
    WINDOW: tl.constexpr,
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
        pattern, q_block, k_block, q_stop, spans, codes, q_len, k_len, BOUNDED, ROUTED, PATTERNS,
            WINDOW,
    )  # fmt: skip
    new = tl.maximum(peak, tl.max(scores, 1))
    if ROUTED or PATTERNS or WINDOW > 0:
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
    spans,
    codes,
    whole,
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
    WINDOW: tl.constexpr,
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

    # What needs no comparison comes first: only the last block of a list can reach past the keys, and
    # lists of windows name the tiles first that are seen whole.
    last = total
    if BOUNDED == 1:
        last = tl.maximum(total - tiles, 0)
    if WINDOW > 0:
        last = tl.load(whole + list_row)
    for i in range(0, last):
        start, stop, owner, pattern = _place(
            i, list_at, tiles, BN, k_block, k_len, starts, stops, owners, pattern_of, pattern_at,
            ROUTED, PATTERNS,
        )  # fmt: skip
        acc0, acc1, mass, peak = _attend(
            acc0, acc1, mass, peak, q0, q1, k_desc, k_rest, v_desc, v_rest, batch, head // GROUP,
            start, stop, rows, q_stop, scale_log2, bits, word_at, owner, patterns, pattern,
            spans, codes, q_len, k_len, D0, D1, q_block, k_block, BN, BOUNDED == 2, ROUTED,
            PATTERNS, 0, UP, precision,
        )  # fmt: skip
    if BOUNDED == 1 or WINDOW > 0:
        for i in range(last, total):
            start, stop, owner, pattern = _place(
                i, list_at, tiles, BN, k_block, k_len, starts, stops, owners, pattern_of,
                pattern_at, ROUTED, PATTERNS,
            )  # fmt: skip
            acc0, acc1, mass, peak = _attend(
                acc0, acc1, mass, peak, q0, q1, k_desc, k_rest, v_desc, v_rest, batch,
                head // GROUP, start, stop, rows, q_stop, scale_log2, bits, word_at, owner,
                patterns, pattern, spans, codes, q_len, k_len, D0, D1, q_block, k_block, BN,
                BOUNDED > 0, ROUTED, PATTERNS, WINDOW, UP, precision,
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
