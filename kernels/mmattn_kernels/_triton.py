"""What the Triton launchers share. Imported by them only, so Triton is loaded on first use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mmattn_kernels._backends import interpreting

LOG2E = 1.4426950408889634


def padded_dim(dim: int) -> int:
    """The least power of two that holds `dim`, at least 16: what a tile of `tl.dot` needs."""
    return max(16, 1 << (dim - 1).bit_length())


def split_dim(dim: int) -> tuple[int, int]:
    """Two powers of two that hold `dim` with the least padding: 72 -> 64 + 16, 128 -> 128 + 0.

    Two narrow products cost less than one padded to the next power of two (72 would become 128).
    """
    whole = padded_dim(dim)
    if whole <= 32 or dim > whole * 3 // 4:
        return whole, 0
    rest = dim - whole // 2
    return whole // 2, padded_dim(rest)


def upcast(x: Tensor) -> bool:
    """Whether kernels must lift operands to fp32 first: the interpreter multiplies bfloat16 wrongly."""
    return interpreting() and x.dtype == torch.bfloat16


def result_dtype(x: Tensor) -> torch.dtype:
    """dtype of a result like `x` while a kernel writes it; the interpreter would truncate to bfloat16."""
    return torch.float32 if upcast(x) else x.dtype


def aligned(x: Tensor) -> Tensor:
    """`x` itself if a tensor descriptor can read it, else a copy whose rows are 16-byte aligned."""
    size = x.element_size()
    if x.shape[-1] * size % 16:
        step = 16 // size
        x = F.pad(x, (0, -x.shape[-1] % step))
    fits = x.stride(-1) == 1 and all(
        stride * size % 16 == 0 and stride > 0 for stride in x.stride()[:-1]
    )
    return x if fits and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def descriptor(x: Tensor, *block: int) -> Any:
    """A tensor descriptor over `x`, read in boxes of `block`; what lies outside reads as zero."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block))


def multiprocessors(x: Tensor) -> int:
    """How many programs run side by side: those of the device of `x`, an H100's where there is none.

    Two when interpreting, so that small problems are split as well.
    """
    if x.is_cuda:
        return int(torch.cuda.get_device_properties(x.device).multi_processor_count)
    return 2 if interpreting() else 132


@contextlib.contextmanager
def on_device(x: Tensor) -> Iterator[None]:
    """Launch on the device of `x`."""
    if x.is_cuda:
        with torch.cuda.device(x.device):
            yield
    else:
        yield
