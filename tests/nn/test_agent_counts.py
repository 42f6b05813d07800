"""Parameters and multiply-adds of every Agent model, against the executed official modules."""

import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mmattn.nn.agent_cswin
import mmattn.nn.agent_deit
import mmattn.nn.agent_pvt
import mmattn.nn.agent_swin  # noqa: F401

PUBLISHED = [
    ("agent_deit_tiny", 224, 6_015_640, 1.176),
    ("agent_deit_small", 224, 22_647_112, 4.443),
    ("agent_deit_small", 448, 23_070_472, 17.705),
    ("agent_deit_base", 224, 87_204_904, 17.552),
    ("agent_pvt_tiny", 224, 11_570_352, 2.000),
    ("agent_pvt_small", 224, 20_635_066, 3.978),
    ("agent_pvt_medium", 224, 35_921_746, 7.035),
    ("agent_pvt_medium", 256, 36_083_682, 9.189),
    ("agent_pvt_large", 224, 48_738_180, 10.390),
    ("agent_swin_tiny", 224, 28_902_964, 4.528),
    ("agent_swin_small", 224, 49_666_684, 8.733),
    ("agent_swin_small", 288, 49_707_964, 14.586),
    ("agent_swin_base", 224, 88_095_096, 15.444),
    ("agent_swin_base", 384, 88_305_016, 46.337),
    ("agent_cswin_tiny", 224, 20_458_672, 4.315),
    ("agent_cswin_small", 224, 32_814_100, 6.778),
    ("agent_cswin_base", 224, 73_249_696, 14.923),
    ("agent_cswin_base", 384, 73_328_416, 46.333),
]


class Counter(TorchDispatchMode):
    """Counts as fvcore does: products, five per normed element, pooling inputs, four per resized pixel."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm"):
            self.total += args[0].numel() * args[1].shape[-1]
        elif name == "addmm":
            self.total += args[1].numel() * args[2].shape[-1]
        elif name == "convolution":
            self.total += out.numel() * args[1][0].numel()
        elif name == "native_layer_norm":
            self.total += 5 * args[0].numel()
        elif name == "_adaptive_avg_pool2d":
            self.total += args[0].numel()
        elif name == "upsample_bilinear2d":
            self.total += 4 * out.numel()
        return out


# The quick suite counts one shallow model of every family and the one with few agent blocks.
QUICK = (
    "agent_deit_tiny",
    "agent_deit_base",
    "agent_pvt_tiny",
    "agent_swin_tiny",
    "agent_cswin_tiny",
)
CASES = [pytest.param(*row, marks=[] if row[0] in QUICK else pytest.mark.slow) for row in PUBLISHED]


@pytest.mark.parametrize(("name", "size", "params", "gmacs"), CASES)
def test_counts(name, size, params, gmacs):
    model = timm.create_model(name, img_size=size, device="meta").eval()
    assert sum(p.numel() for p in model.parameters()) == params
    with torch.no_grad(), Counter() as counter:
        model(torch.empty(1, 3, size, size, device="meta"))
    total = counter.total
    if name.startswith("agent_pvt"):
        # The official model resizes the positions of stages 2 to 4 to the size they already have.
        total += 4 * sum(stage.downsample.pos_embed.numel() for stage in model.stages[1:])
    assert round(total / 1e9, 3) == gmacs
