"""Panel attention: which panels of a canvas, or pictures of a batch, see each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from mmattn_kernels import attention_with_column_mass
from torch import Tensor

from mmattn.errors import ConfigError, UnsupportedCall
from mmattn.methods._blocks import token_order
from mmattn.methods._calls import image_tokens, key_mask, run_dense
from mmattn.methods._recall import note_recall
from mmattn.methods.base import Dense, Method, require
from mmattn.sites import Site

VISIBILITIES = ("full", "group", "isolated", "reference-blocked")


@dataclass(frozen=True, kw_only=True)
class PanelAttention(Method):
    """Lets a panel attend to the panels it may see, and to its share of the text.

    A set of related pictures is drawn as the panels of one canvas ("In-Context LoRA for Diffusion
    Transformers", arXiv 2410.23775) or as the rows of one batch whose images attend to each other ("Group
    Diffusion Transformers are Unsupervised Multitask Learners", arXiv 2410.15027, here with `members`).
    Queries that see the same keys run as one dense call of the host's own attention over just these keys,
    so nothing is masked, and eight isolated panels cost an eighth.

    What the text tokens of a joint sequence read decides whether panels are really apart, because every
    panel reads the text one layer later. `text="shared"`: every panel sees all text, and the text sees
    the panels that *every* panel may see: all of them with "full", only the given ones with
    "reference-blocked", none with "isolated". `text="split"`: the text is as many equally long pieces as
    there are panels; piece k sees panel k and itself, and only panel k sees it (the GDT rule). Either way
    panel j has exactly no influence on panel i unless a chain of allowed pairs leads from i to j.

    Compared in the tests with masked `F.scaled_dot_product_attention`, the mask written pair by pair from
    the definition, on FLUX, SD3 and PixArt and on the embedded model, and with FLUX's own masks.

    Deviations: In-Context LoRA masks nothing ("full"). GDT was trained for its rule; models without that
    training see an unusual sequence. The panels of a canvas have positions of their own, where GDT's
    pictures (and `members`) all have the same ones. Convolutions and the VAE do not know of panels.

    Args:
        rows, cols: panels of the canvas, at least 1 each; they must divide the token grid.
        members: instead, rows of the batch per group, at least 2; 0 for a canvas. Every
            `members` rows in a row of the batch are one group. The text of a row is its own ("split").
        visibility: ``full``, ``group`` (all panels see each other, split text), ``isolated``,
            ``reference-blocked`` (given panels see given ones only, others see everything), or a square
            matrix of bools, ``visibility[i][j]``: panel i sees panel j. A panel always sees itself.
        references: how many panels are given, counted from the first; for ``reference-blocked``.
        text: ``shared`` or ``split``, as above.

    Shapes:
        ``q, k, v [B, H, N, D]`` with the N image and text tokens in the host's order; in cross-attention
        (acted on for split text only) the keys are the text.

    Raises:
        UnsupportedCall: no grid, or more than one frame; panels or pieces of text that do not divide the
            tokens; a batch that does not divide into groups; a mask that differs from query to query.
        ConfigError: knobs out of range or at odds.
    """

    name: ClassVar[str] = "panel-attention"
    kinds: ClassVar[tuple[str, ...]] = ("self", "joint", "cross")
    hosts: ClassVar[tuple[str, ...]] = ("diffusers",)
    needs: ClassVar[frozenset[str]] = frozenset({"grid"})
    paper: ClassVar[str] = "Group Diffusion Transformers, arXiv 2410.15027"
    masks: ClassVar[bool] = True
    probes: ClassVar[bool] = True

    rows: int = 1
    cols: int = 2
    members: int = 0
    visibility: str | Sequence[Sequence[bool]] = "isolated"
    references: int = 0
    text: Literal["shared", "split"] = "shared"

    def __post_init__(self) -> None:
        """Check the knobs, bring a matrix into the form of tuples, and settle what `group` implies."""
        require(
            all(type(n) is int and n >= 1 for n in (self.rows, self.cols)),
            f"rows and cols are numbers of panels, at least 1, got {self.rows!r} and {self.cols!r}",
        )
        require(
            self.members == 0 or (type(self.members) is int and self.members >= 2),
            f"members is a number of pictures per group, at least 2, or 0, got {self.members!r}",
        )
        require(self.text in ("shared", "split"), f"text is shared or split, got {self.text!r}")
        if self.members or self.visibility == "group":
            object.__setattr__(self, "text", "split")
        if isinstance(self.visibility, str):
            require(
                self.visibility in VISIBILITIES,
                f"visibility is one of {list(VISIBILITIES)} or a matrix, got {self.visibility!r}",
            )
        else:
            object.__setattr__(self, "visibility", _matrix(self.visibility, self.count))
        blocked = self.visibility == "reference-blocked"
        low, high = (1, self.count - 1) if blocked else (0, self.count)
        require(
            type(self.references) is int and low <= self.references <= high,
            f"references must be from {low} to {high} for {self.count} panels with "
            f"visibility={self.visibility!r}, got {self.references!r}",
        )

    @property
    def count(self) -> int:
        """How many panels, or pictures of a group, there are."""
        return self.members or self.rows * self.cols

    @property
    def sees(self) -> tuple[tuple[bool, ...], ...]:
        """``sees[i][j]``: panel i attends to panel j."""
        if not isinstance(self.visibility, str):
            return tuple(tuple(row) for row in self.visibility)
        n, given = range(self.count), self.references
        rule = {
            "isolated": lambda i, j: i == j,
            "reference-blocked": lambda i, j: i >= given or j < given,
        }.get(self.visibility, lambda i, j: True)
        return tuple(tuple(rule(i, j) for j in n) for i in n)

    def accepts(self, site: Site) -> str | None:
        """Cross-attention is left alone unless the text of a canvas is split."""
        if site.kind == "cross" and (self.members or self.text == "shared"):
            return "cross-attention already reads what it should: all text, or the row's own"
        return None

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
        """Dense attention of each set of queries over the keys they see."""
        keys = key_mask(mask)
        if not self.members:
            calls = plan_calls(self.sees, self._canvas(site, q, k))
            if len(calls) == 1:
                reason = "every panel sees everything"
                return run_dense(q, k, v, site=site, dense=dense, reason=reason)
            return _attend(calls, q, k, v, mask=keys, scale=scale, site=site, dense=dense)
        calls = plan_calls(self.sees, self._members(site, q, k))
        if sum(map(sum, self.sees)) == self.count:
            reason = "no picture sees another"
            return run_dense(q, k, v, site=site, dense=dense, reason=reason)
        if keys is not None:
            keys = keys.expand(q.shape[0], -1, -1, -1).transpose(2, 3)
            keys = self._fold(keys).transpose(2, 3)
        q, k, v = self._fold(q), self._fold(k), self._fold(v)
        out = _attend(calls, q, k, v, mask=keys, scale=scale, site=site, dense=dense)
        whole: Tensor = out.unflatten(2, (self.members, -1)).transpose(1, 2).flatten(0, 1)
        return whole

    def _fold(self, x: Tensor) -> Tensor:
        """Rows of a group one behind the other, ``[G * n, H, N, D]`` -> ``[G, H, n * N, D]``."""
        folded: Tensor = x.unflatten(0, (-1, self.members)).transpose(1, 2).flatten(2, 3)
        return folded

    def _canvas(self, site: Site, q: Tensor, k: Tensor) -> Parts:
        """Tokens of every panel, and of every piece of text, on one canvas."""
        n, device, cross = self.count, q.device, site.kind == "cross"
        if cross:
            grid, image = site.layout.grid_for(q.shape[2]), slice(0, q.shape[2])
            text = torch.arange(k.shape[2], device=device)
        else:
            _same_tokens(q, k)
            grid, _, image = image_tokens(site, q.shape[2], k.shape[2])
            every = torch.arange(k.shape[2], device=device)
            text = torch.cat([every[: image.start], every[image.stop :]])
        frames, height, width = grid
        fits = frames == 1 and height * width == image.stop - image.start
        if not fits or height % self.rows or width % self.cols:
            raise UnsupportedCall(
                f"{self.rows} x {self.cols} panels do not divide the token grid {grid} (frames, rows, "
                "columns); choose panel sizes that are whole tokens."
            )
        if len(text) % n and self.text == "split":
            raise UnsupportedCall(
                f"{len(text)} text tokens do not divide into {n} equally long captions; encode one "
                "caption for every panel with the same length and join them."
            )
        tile = (1, height // self.rows, width // self.cols)
        order = token_order(grid, tile, device)
        assert order is not None
        panels = (order + image.start).chunk(n)
        pieces = text.chunk(n) if self.text == "split" and len(text) else (text,)
        return Parts(panels, pieces if len(text) else (), self.text == "split", cross)

    def _members(self, site: Site, q: Tensor, k: Tensor) -> Parts:
        """Tokens of every picture and of its text after `_fold`."""
        n, tokens = self.members, q.shape[2]
        if q.shape[0] % n:
            raise UnsupportedCall(
                f"A batch of {q.shape[0]} rows does not divide into groups of {n} pictures."
            )
        _same_tokens(q, k)
        _, _, image = image_tokens(site, tokens, tokens)
        every = torch.arange(tokens, device=q.device)
        text = torch.cat([every[: image.start], every[image.stop :]])
        panels = tuple(every[image] + i * tokens for i in range(n))
        pieces = tuple(text + i * tokens for i in range(n)) if len(text) else ()
        return Parts(panels, pieces, True, False)


class Parts(NamedTuple):
    """Tokens of a sequence by owner.

    Args:
        panels: positions of the image tokens of every panel.
        text: positions of the text: one piece per panel where `split`, else one piece, or none.
        split: whether a piece of text belongs to one panel.
        cross: whether text is only keys, and panels only queries.
    """

    panels: tuple[Tensor, ...]
    text: tuple[Tensor, ...]
    split: bool
    cross: bool


class Call(NamedTuple):
    """Positions of queries, and of the keys that all of them see."""

    rows: Tensor
    keys: Tensor


def plan_calls(sees: Sequence[Sequence[bool]], parts: Parts) -> list[Call]:
    """Every query in exactly one call, queries with the same keys together."""
    n = range(len(parts.panels))
    wanted: dict[tuple[tuple[int, ...], tuple[int, ...]], list[Tensor]] = {}
    whole = tuple(range(len(parts.text)))
    for i in n:
        images = () if parts.cross else tuple(j for j in n if sees[i][j])
        text = (i,) if parts.split and parts.text else whole
        wanted.setdefault((images, text), []).append(parts.panels[i])
    for piece, tokens in enumerate(() if parts.cross else parts.text):
        images = (piece,) if parts.split else tuple(j for j in n if all(sees[i][j] for i in n))
        wanted.setdefault((images, (piece,)), []).append(tokens)
    return [
        Call(
            torch.cat(rows),
            torch.cat([*(parts.panels[j] for j in images), *(parts.text[p] for p in text)]),
        )
        for (images, text), rows in wanted.items()
    ]


def _attend(
    calls: list[Call],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    scale: float | None,
    site: Site,
    dense: Dense,
) -> Tensor:
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    pairs = 0
    for rows, keys in calls:
        some_q, some_k, some_v = q[:, :, rows], k[:, :, keys], v[:, :, keys]
        some_mask = None if mask is None else mask[..., keys]
        out[:, :, rows] = dense(some_q, some_k, some_v, mask=some_mask, scale=scale)
        pairs += len(rows) * len(keys)
        if site.probing:
            found = attention_with_column_mass(some_q, some_k, some_v, mask=some_mask, scale=scale)
            lse[:, :, rows] = found[1].float()
    site.note("density", pairs / (q.shape[2] * k.shape[2]))
    if site.probing:
        note_recall(site, lse, q, k, v, mask=mask, scale=scale)
    return out


def _same_tokens(q: Tensor, k: Tensor) -> None:
    if q.shape[2] != k.shape[2]:
        raise UnsupportedCall(
            f"Queries and keys are different tokens here ({q.shape[2]} and {k.shape[2]}), and panels "
            "need to be both."
        )


def _matrix(given: Any, count: int) -> tuple[tuple[bool, ...], ...]:
    try:
        rows = tuple(tuple(bool(cell) for cell in row) for row in given)
    except TypeError:
        rows = ()
    if len(rows) != count or any(len(row) != count for row in rows):
        raise ConfigError(
            f"visibility as a matrix is {count} rows of {count} bools for {count} panels, got {given!r}"
        )
    blind = [i for i in range(count) if not rows[i][i]]
    require(
        not blind, f"a panel always sees itself, but the matrix hides panels {blind} from itself"
    )
    return rows
