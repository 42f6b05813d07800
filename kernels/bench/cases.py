"""What is measured: the ops on shapes of known models, and the attention each must equal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import mmattn_kernels as mm
import torch
from torch import Tensor


@dataclass
class Case:
    """One line of the table.

    Args:
        op: public name of the op.
        label: shape and settings.
        density: share of the pairs that dense attention computes and this one needs.
        qkv: inputs, also of the dense baseline.
        run: one call, whose output is ``[B, H, Q, D]``.
        allowed: which keys some rows see, for the check; see `measure.exact_rows`. None if `check` is given.
        check: an own check, the largest error found.
        parts: other works to time beside, such as the making of lists.
        target: share of the ideal speed-up that is asked for, or (with `cost`) the most times SDPA.
    """

    op: str
    label: str
    density: float
    qkv: tuple[Tensor, Tensor, Tensor]
    run: Callable[[], Tensor]
    allowed: Callable[[int, int, Tensor], Tensor | None] | None = None
    check: Callable[[], float] | None = None
    parts: dict[str, Callable[[], Any]] = field(default_factory=dict)
    target: float | None = None
    cost: bool = False


@dataclass(frozen=True)
class Shape:
    """Batch, heads, tokens and head dimension of a model's attention."""

    name: str
    heads: int
    tokens: int
    dim: int
    grid: tuple[int, ...] | None = None


CPU_SHAPES = (
    Shape("4096", 8, 4096, 64, (64, 64)),
    Shape("8192", 8, 8192, 64, (8, 32, 32)),
    Shape("16384", 8, 16384, 64, (128, 128)),
)
GPU_SHAPES = (
    Shape("Wan2.1-1.3B 480p", 12, 32760, 128, (21, 30, 52)),
    Shape("Wan2.1-1.3B 720p", 12, 75600, 128, (21, 45, 80)),
    Shape("Wan2.1-14B 720p", 40, 75600, 128, (21, 45, 80)),
    Shape("HunyuanVideo 720p", 24, 115200, 128, (30, 48, 80)),
    Shape("FLUX 1024^2", 24, 4608, 128),
    Shape("FLUX 4K", 24, 65536, 128, (256, 256)),
)


def inputs(shape: Shape, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Normal q, k, v ``[1, H, N, D]``."""
    draw = torch.Generator(device).manual_seed(0)
    size = (1, shape.heads, shape.tokens, shape.dim)
    q, k, v = (
        torch.randn(size, generator=draw, device=device, dtype=torch.float32).to(dtype)
        for _ in range(3)
    )
    return q, k, v


def random_blocks(
    shape: Shape, block: int, density: float, device: str
) -> tuple[Tensor, mm.BlockLists]:
    """A random mask of blocks with equally many per row, and its lists."""
    n = -(-shape.tokens // block)
    keep = max(1, round(density * n))
    draw = torch.Generator(device).manual_seed(1)
    ranks = torch.rand(1, shape.heads, n, n, generator=draw, device=device).argsort(-1).argsort(-1)
    mask = ranks < keep
    sizes = {"q_len": shape.tokens, "k_len": shape.tokens, "q_block": block, "k_block": block}
    return mask, mm.BlockLists.from_mask(mask, **sizes)


def block_sparse(
    shape: Shape, device: str, dtype: torch.dtype, densities: tuple[float, ...]
) -> Iterator[Case]:
    """Random lists of 64 and 128 blocks."""
    q, k, v = inputs(shape, device, dtype)
    for block in (128, 64):
        for density in densities:
            mask, lists = random_blocks(shape, block, density, device)

            def allowed(
                item: int, head: int, rows: Tensor, mask: Tensor = mask, block: int = block
            ) -> Tensor:
                kept = mask[0, head, rows // block]
                return kept.repeat_interleave(block, 1)[:, : shape.tokens]

            def make(mask: Tensor = mask, block: int = block) -> Any:
                sizes = {"q_len": shape.tokens, "k_len": shape.tokens}
                return mm.BlockLists.from_mask(mask, **sizes, q_block=block, k_block=block)

            yield Case(
                "block_sparse_attention",
                f"{shape.name}, blocks of {block}",
                float(lists.density()),
                (q, k, v),
                lambda lists=lists: mm.block_sparse_attention(q, k, v, lists),
                allowed,
                parts={"lists": make},
                target=_sparse_target(device, shape, block, density),
            )


def _sparse_target(device: str, shape: Shape, block: int, density: float) -> float | None:
    if density == 1.0:
        return 0.75 if device == "cuda" else None
    if device == "cpu":
        return 0.7 if shape.tokens >= 8192 and density <= 0.25 else None
    if shape.tokens < 32_000 or density > 0.25:
        return None
    return 0.65 if block == 128 else 0.55


def routed(shape: Shape, device: str, dtype: torch.dtype, density: float) -> Iterator[Case]:
    """Chunks of 455 tokens (VMoBA's cuboids at 480p), queries of one chunk choosing nearly alike."""
    q, k, v = inputs(shape, device, dtype)
    chunk = 455
    ids = torch.arange(shape.tokens, device=device) // chunk
    count = -(-shape.tokens // chunk)
    keep = max(1, round(density * count))
    draw = torch.Generator(device).manual_seed(1)
    gate = torch.rand(1, shape.heads, count, count, generator=draw, device=device)
    gate = gate.index_select(2, ids)
    gate = gate + 0.05 * torch.rand(gate.shape, generator=draw, device=device)
    chosen = torch.zeros(gate.shape, dtype=torch.bool, device=device)
    chosen.scatter_(3, gate.topk(keep, dim=3).indices, True)
    kept = float(chosen.double().mean())

    def allowed(item: int, head: int, rows: Tensor) -> Tensor:
        return chosen[0, head, rows][:, ids]

    yield Case(
        "routed_attention",
        f"{shape.name}, chunks of {chunk}",
        kept,
        (q, k, v),
        lambda: mm.routed_attention(q, k, v, ids, chosen),
        allowed,
        parts={"choice": lambda: gate.topk(keep, dim=3)},
    )


def neighborhood(shape: Shape, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Aligned windows, where whole tiles are kept or skipped, and stride 1, where they are not."""
    if shape.grid is None:
        return
    q, k, v = inputs(shape, device, dtype)
    grid = shape.grid
    aligned = tuple(min(8, n) if i or len(grid) == 2 else n for i, n in enumerate(grid))
    settings: list[tuple[tuple[int, ...], tuple[int, ...] | int]] = [
        (tuple(2 * n if 2 * n <= m else m for n, m in zip(aligned, grid, strict=True)), aligned),
        (tuple(min(13, n) for n in grid), 1),
    ]
    for window, stride in settings:
        density = 1.0
        for w, n in zip(window, grid, strict=True):
            density *= w / n

        def run(window: Any = window, stride: Any = stride) -> Tensor:
            out = mm.neighborhood_attention(q, k, v, grid, window=window, stride=stride)
            assert isinstance(out, Tensor)
            return out

        def allowed(
            item: int, head: int, rows: Tensor, window: Any = window, stride: Any = stride
        ) -> Tensor:
            return window_mask(grid, window, stride, rows)

        yield Case(
            "neighborhood_attention",
            f"{'x'.join(map(str, grid))}, window {'x'.join(map(str, window))}, stride "
            f"{stride if isinstance(stride, int) else 'x'.join(map(str, stride))}",
            density,
            (q, k, v),
            run,
            allowed,
            target=0.8 if device == "cuda" and stride != 1 else None,
        )


def window_mask(
    grid: tuple[int, ...], window: tuple[int, ...], stride: Any, rows: Tensor
) -> Tensor:
    """Which keys some rows see, bool ``[rows, K]``: the definition, without dilation."""
    strides = (stride,) * len(grid) if isinstance(stride, int) else stride
    left = rows
    seen = torch.ones(len(rows), 1, dtype=torch.bool, device=rows.device)
    axes = []
    for n, w, s in zip(reversed(grid), reversed(window), reversed(strides), strict=True):
        at, left = left % n, left // n
        leader = (s * (at // s) + s // 2).clamp(max=n - 1)
        start = (leader - w // 2).clamp(0, n - w)
        key = torch.arange(n, device=rows.device)
        axes.append((key >= start[:, None]) & (key < start[:, None] + w))
    for axis in reversed(axes):
        seen = (seen[:, :, None] & axis[:, None, :]).flatten(1)
    return seen


def eager(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention with its probabilities written out, as a user without the op must do it."""
    weights = torch.softmax(q @ k.transpose(2, 3) * q.shape[3] ** -0.5, -1)
    return weights @ v, weights


def column_mass(shape: Shape, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Output and the mass every key receives, against SDPA and against eager attention."""
    q, k, v = inputs(shape, device, dtype)

    def check() -> float:
        _, lse, mass = mm.attention_with_column_mass(q, k, v)
        columns = torch.arange(0, shape.tokens, 97, device=device)
        scores = q[0, 0].double() @ k[0, 0, columns].double().T * shape.dim**-0.5
        want = torch.exp(scores - lse[0, 0].double()[:, None]).sum(0)
        total = (mass.sum(-1) / shape.tokens - 1).abs().max()
        return max(float((mass[0, 0, columns].double() - want).abs().max()), float(total))

    yield Case(
        "attention_with_column_mass",
        shape.name,
        1.0,
        (q, k, v),
        lambda: mm.attention_with_column_mass(q, k, v),
        check=check,
        parts={"eager": lambda: eager(q, k, v)[1].sum(2)},
        target=1.6 if device == "cuda" else 2.5,
        cost=True,
    )


def grouped(shape: Shape, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Three groups of keys whose mass decides how they are weighed."""
    q, k, v = inputs(shape, device, dtype)
    groups = torch.zeros(1, shape.tokens, dtype=torch.int64, device=device)
    groups[:, 8:] = 1
    groups[:, shape.tokens // 2 :] = 2

    def weigh(masses: Tensor) -> Tensor:
        return 1 + masses[..., :1] * torch.tensor([-1.0, 1.0, 0.5], device=device)

    def run() -> Tensor:
        out = mm.grouped_attention(q, k, v, groups, weigh, num_groups=3)
        assert isinstance(out, Tensor)
        return out

    def check() -> float:
        out = run()
        rows = torch.arange(0, shape.tokens, 331, device=device)
        scores = q[0, 0, rows].double() @ k[0, 0].double().T * shape.dim**-0.5
        weights = scores.softmax(-1)
        masses = torch.stack([weights[:, groups[0] == g].sum(1) for g in range(3)], -1)
        want = (weights * weigh(masses)[:, groups[0]]) @ v[0, 0].double()
        return float((out[0, 0, rows].double() - want).abs().max())

    def by_hand() -> Tensor:
        weights = eager(q, k, v)[1]
        masses = torch.stack([weights[..., groups[0] == g].sum(-1) for g in range(3)], -1)
        return (weights * weigh(masses)[..., groups[0]]) @ v

    yield Case(
        "grouped_attention",
        f"{shape.name}, 3 groups",
        1.0,
        (q, k, v),
        run,
        check=check,
        parts={"eager": by_hand},
        target=None if device == "cuda" else 2.5,
        cost=True,
    )


def linear(shape: Shape, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Rectified features and their sum as normaliser, as in Sana."""
    q, k, v = inputs(shape, device, dtype)

    def run() -> Tensor:
        return mm.linear_attention(q, k, v, feature_map="relu", normalizer="sum")

    def check() -> float:
        rows = torch.arange(0, shape.tokens, 331, device=device)
        weights = q[0, 0, rows].double().relu() @ k[0, 0].double().relu().T
        want = (weights / weights.sum(1, keepdim=True)) @ v[0, 0].double()
        return float((run()[0, 0, rows].double() - want).abs().max())

    yield Case("linear_attention", shape.name, 1.0, (q, k, v), run, check=check, cost=True)


_WITH_EAGER = ("attention_with_column_mass", "grouped_attention")


def cases(device: str, ops: set[str], quick: bool) -> Iterator[Case]:
    """Every line for a device; `quick` keeps the smallest shape."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    shapes = CPU_SHAPES if device == "cpu" else GPU_SHAPES
    densities = (0.1, 0.25, 0.5) if device == "cpu" else (0.1, 0.25, 0.5, 1.0)
    makers: dict[str, Callable[[Shape], Iterator[Case]]] = {
        "block_sparse_attention": lambda s: block_sparse(s, device, dtype, densities),
        "routed_attention": lambda s: routed(s, device, dtype, 0.25),
        "neighborhood_attention": lambda s: neighborhood(s, device, dtype),
        "attention_with_column_mass": lambda s: column_mass(s, device, dtype),
        "grouped_attention": lambda s: grouped(s, device, dtype),
        "linear_attention": lambda s: linear(s, device, dtype),
    }
    unknown = ops - set(makers)
    if unknown:
        raise SystemExit(f"unknown ops {sorted(unknown)}; there are {list(makers)}")
    for name, make in makers.items():
        if ops and name not in ops:
            continue
        for shape in shapes[: 1 if quick else None]:
            # Eager attention at 16 384 tokens would hold 8 GB of probabilities.
            if device == "cpu" and name in _WITH_EAGER and shape.tokens > 8192:
                continue
            yield from make(shape)
