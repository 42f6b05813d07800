"""What attention and video transformers cost, in floating-point operations, from shapes alone.

Convention everywhere: one multiply-add is 2 FLOPs, one forward of one sample unless a batch is given, and
only matrix products count (no softmax, norms, activations or rotary embeddings). Nothing is built or run.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import cos, pi, prod

from mmattn.layout import Grid


def attention_flops(b: int, h: int, q: int, k: int, d: int, density: float = 1.0) -> float:
    """FLOPs of attention: queries times keys, then probabilities times values.

    Args:
        b: batch.
        h: query heads.
        q: queries.
        k: keys.
        d: head dim.
        density: share of the query-key pairs that is computed, 1 for dense attention.

    Returns:
        ``4 * b * h * q * k * d * density``.
    """
    return 4 * b * h * q * k * d * density


def neighborhood_flops(b: int, h: int, s: int, d: int, window: Sequence[int]) -> float:
    """FLOPs of neighborhood attention, in which every query sees exactly one window of keys.

    It is the count of "Generalized Neighborhood Attention", arXiv 2504.16922: stride and dilation change
    nothing, and a causal window is not discounted.

    Args:
        b: batch.
        h: query heads.
        s: tokens.
        d: head dim.
        window: keys along each axis.

    Returns:
        ``4 * b * h * s * d * prod(window)``.
    """
    return 4 * b * h * s * d * prod(window)


def gate_flops(b: int, h: int, s: int, d: int, chunks: float) -> float:
    """FLOPs of scoring `chunks` mean keys for each of `s` queries: ``2 * b * h * s * d * chunks``."""
    return 2 * b * h * s * d * chunks


def linear_flops(tokens: int, inputs: int, outputs: int) -> float:
    """FLOPs of a linear layer: ``2 * tokens * inputs * outputs``."""
    return 2 * tokens * inputs * outputs


def wan_forward_flops(
    grid: Grid,
    *,
    layers: int = 30,
    dim: int = 1536,
    ffn: int = 8960,
    text: int = 300,
    density: float = 1.0,
    chunks: float = 0.0,
) -> float:
    """FLOPs of the blocks of a Wan video transformer, one forward of one clip.

    With S tokens and T text tokens, a layer costs ``8 S dim^2`` for the projections of self-attention,
    ``4 S^2 dim density`` for the attention itself, ``2 S dim chunks`` for scoring chunks, ``4 S dim^2 +
    4 T dim^2 + 4 S T dim`` for cross-attention and ``4 S dim ffn`` for the feed-forward. Heads do not
    appear: they share `dim`.

    Left out: the patch embedding, the time and text embedders, the modulation and the output projection,
    under 0.01 % of Wan 1.3B at 81 x 480 x 832; the text encoder and the autoencoder; and classifier-free
    guidance, which doubles everything.

    It is the count behind the tables of "VMoBA", arXiv 2506.23858 (Wan 1.3B, the defaults here), in
    units of 1e12:

    | clip                 | grid         | chunks 1-D/2-D/3-D | density | here   | paper  |
    |----------------------|--------------|--------------------|---------|--------|--------|
    | 93 x 576 x 1024      | 24 x 36 x 64 | none               | 1       | 705.02 | 705.02 |
    |                      |              | 8 / 48 / 72        | 0.19    | 248.73 | 248.68 |
    | 141 x 480 x 832      | 36 x 30 x 52 | none               | 1       | 724.97 | 724.97 |
    |                      |              | 12 / 24 / 36       | 0.18    | 248.40 | 248.39 |
    | 81 x 720 x 1280      | 21 x 45 x 80 | none               | 1       | 1246.79 | 1246.79 |
    |                      |              | 7 / 40 / 36        | 0.31    | 520.09 | 519.75 |
    | 13440 tokens         | 20 x 24 x 28 | none               | 1       | 67.73  | 67.73  |
    |                      |              | 10 / 48 / 60       | 0.18    | 40.48  | 40.48  |
    | 81 x 480 x 832       | 21 x 30 x 52 | none               | 1       | 281.64 | 282.64 |
    |                      |              | none               | 0.5     | 182.73 | 182.73 |

    `chunks` is the mean of the three counts. Where the paper is off: 282.64 must be 281.64, as its own row
    at density 0.5 shows, and that row counts no scoring of chunks (with 7 / 24 / 72 it is 182.84). The
    row of 67.73 fits 13440 tokens, dense and sparse, on whatever grid; the paper's pre-training clip of
    77 x 288 x 512 has 11520 tokens and would cost 53.99. The densities are rounded to two digits: 248.68
    and 519.75 belong to 0.1899 and 0.3097, which is all of the 0.02 % and 0.07 % between the columns.
    "Sparsity" in those tables is what is called density here.

    Args:
        grid: frames, rows and columns of tokens, after the autoencoder and the patch embedding.
        layers: transformer blocks.
        dim: channels.
        ffn: hidden channels of the feed-forward.
        text: text tokens. The paper counts 300; `WanPipeline` pads every prompt to 512, which adds 0.5 %
            at 81 x 480 x 832.
        density: share of the query-key pairs that self-attention computes, mean over layers; for a run,
            what ``session.stats.density`` says.
        chunks: mean keys that every query is compared with to choose, mean over layers; 0 for none.
    """
    s = prod(grid)
    projections = 4 * linear_flops(s, dim, dim)
    attention = attention_flops(1, 1, s, s, dim, density) + gate_flops(1, 1, s, dim, chunks)
    cross = 2 * linear_flops(s, dim, dim) + 2 * linear_flops(text, dim, dim)
    cross += attention_flops(1, 1, s, text, dim)
    feed_forward = 2 * linear_flops(s, dim, ffn)
    return layers * (projections + attention + cross + feed_forward)


def llava_prefill_flops(
    vision: float | Sequence[float],
    *,
    text: float = 49,
    layers: int = 32,
    dim: int = 4096,
    ffn: int = 11008,
    vocab: int = 32000,
    tower: bool = True,
) -> float:
    """FLOPs of the linear layers of LLaVA-1.5 that reads one picture and a question.

    With t text and v image tokens, a decoder layer costs ``2 (t + v) (4 dim^2 + 3 dim ffn)`` and the output
    layer ``2 (t + v) dim vocab``. In front of it are 24 blocks of CLIP-L/14 at 336 pixels over 577
    tokens, 0.348e12, and the projector over all 576, 0.024e12; tokens are dropped after both. The products
    of attention are left out, unlike elsewhere in this file.

    It is the count behind the table of "HiPrune", arXiv 2508.00553 (7B, the defaults here), in units of
    1e12:

    | image tokens | here | paper |
    |--------------|------|-------|
    | 576          | 8.63 | 8.63  |
    | 192          | 3.56 | 3.56  |
    | 128          | 2.71 | 2.71  |
    | 64           | 1.87 | 1.87  |

    The paper does not say how long its prompt is; 49 is the number of text tokens that gives all four.

    Args:
        vision: image tokens in the language model; one number per layer where layers differ, of which
            the last counts for the output layer too.
        text: text tokens.
        layers: decoder layers.
        dim: channels.
        ffn: hidden channels of the feed-forward.
        vocab: rows of the output layer.
        tower: whether the vision tower and the projector count.

    Raises:
        ValueError: when `vision` has another length than the decoder.
    """
    each = list(vision) if isinstance(vision, Sequence) else [vision] * layers
    if len(each) != layers:
        raise ValueError(f"Found {len(each)} numbers of image tokens for {layers} layers.")
    width = 4 * dim + 3 * ffn
    total = sum(linear_flops(1, dim, width) * (text + v) for v in each)
    total += linear_flops(1, dim, vocab) * (text + each[-1])
    if tower:
        total += 24 * 577 * linear_flops(1, 1024, 4 * 1024 + 2 * 4096)
        total += 576 * (linear_flops(1, 1024, dim) + linear_flops(1, dim, dim))
    return total


def cosine_ratios(layers: int = 32, dense: float = 0.85, least: float = 0.15) -> list[float]:
    """Share of the image tokens that each layer of p-MoD ("p-MoD", arXiv 2412.04449) processes.

    Half a cosine from 1 in the first layer to 0 in the last; layers above `dense` process all tokens, and
    none fewer than `least`. The mean over 32 layers is 0.5375.
    """
    curve = [0.5 * cos(pi * i / max(1, layers - 1)) + 0.5 for i in range(layers)]
    return [1.0 if ratio > dense else max(ratio, least) for ratio in curve]
