"""What every figure needs: models, attention weights of a method, and small files."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from PIL import Image
from torch import Tensor

import mmattn
from mmattn.cli.common import quiet_libraries
from mmattn.loading import Loaded, resolve
from mmattn.sites import Site

plt.rcParams.update({"font.size": 8, "axes.titlesize": 8, "figure.dpi": 100})
BLUE, RED, GREY = "#3b6fb6", "#c2452d", "#b9b9b9"


@functools.cache
def model(name: str) -> Loaded:
    """An embedded model, loaded once."""
    quiet_libraries()
    return resolve(name)


def made(use: str) -> Any:
    """The method that `use` writes down."""
    return eval(use.strip(), {name: getattr(mmattn, name) for name in mmattn.__all__})


class Seen(NamedTuple):
    """One attention call: weights ``[H, Q, K]`` with the method and without it, on the same q and k."""

    site: Site
    layer: int
    past: int
    method: Tensor
    dense: Tensor


def watched(method: Any, wanted: Callable[[Site], bool], log: list[Seen]) -> Any:
    """`method`, which also writes down its attention weights where `wanted`.

    The output is linear in the values, so values that are unit vectors give the weights, whatever the
    method computes inside.
    """
    base = type(method)

    class Watched(base):  # type: ignore[misc, valid-type]
        def attend(self, q: Tensor, k: Tensor, v: Tensor, **call: Any) -> Tensor:
            site, dense = call["site"], call["dense"]
            before = copy.deepcopy(dict(site.state))
            out = base.attend(self, q, k, v, **call)
            if wanted(site):
                after = dict(site.state)

                def once(values: Tensor) -> Tensor:
                    site.state.clear()
                    site.state.update(copy.deepcopy(before))
                    return base.attend(self, q, k, values, **call)

                weights = [_weights(f, k)[0] for f in (once, lambda x: dense(q, k, x))]
                site.state.clear()
                site.state.update(after)
                past = site.layout.past or 0
                log.append(Seen(site, site.index, past, *weights))
            return out

    return Watched(**{f.name: getattr(method, f.name) for f in fields(method)})


def _weights(attention: Callable[[Tensor], Tensor], k: Tensor) -> Tensor:
    b, h, n, d = k.shape
    eye = torch.eye(n, -(-n // d) * d, dtype=k.dtype, device=k.device)
    parts = [attention(part.expand(b, h, n, d).contiguous()) for part in eye.split(d, 1)]
    return torch.cat(parts, -1)[..., :n].detach()


def save(figure: Any, path: Path, colours: int = 96) -> None:
    """Write a figure as a small PNG with a palette.

    Raises:
        SystemExit: when it is larger than a page should load.
    """
    stream = io.BytesIO()
    figure.savefig(stream, format="png", bbox_inches="tight", pad_inches=0.04, facecolor="white")
    plt.close(figure)
    picture = Image.open(stream).convert("RGB").quantize(colours, dither=Image.Dither.NONE)
    picture.save(path, optimize=True)
    if path.stat().st_size > 60 * 1024:
        raise SystemExit(f"{path.name} has {path.stat().st_size} bytes; at most 60 KB are wanted")


def bare(axis: Any, title: str = "") -> Any:
    """An axis without ticks."""
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(title, pad=3)
    return axis


def show(axis: Any, picture: Any, title: str = "", **kwargs: Any) -> Any:
    """A picture ``[3, Y, X]`` or ``[Y, X]`` on an axis, in hard pixels."""
    values = torch.as_tensor(picture).float().cpu()
    values = values.permute(1, 2, 0).clamp(0, 1) if values.ndim == 3 else values
    bare(axis, title).imshow(values.numpy(), interpolation="nearest", **kwargs)
    return axis
