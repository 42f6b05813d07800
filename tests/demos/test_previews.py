"""Latents of different packings become pictures, and unknown packings none rather than an error."""

from __future__ import annotations

from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from mmattn_demos.previews import preview


@pytest.fixture(scope="module")
def wan_like():
    torch.manual_seed(0)
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.5, 1.0, 2.0],
    ).eval()


def as_tensor(image):
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


def test_packed_latents_of_a_video_vae(wan_like):
    """Qwen-Image packs like FLUX and decodes like Wan."""
    cls = diffusers.QwenImagePipeline
    latents = torch.randn(2, 4, 1, 8, 12, generator=torch.Generator().manual_seed(1))
    packed = cls._pack_latents(latents, 2, 4, 8, 12)
    pipe = SimpleNamespace(vae=wan_like, _unpack_latents=cls._unpack_latents, vae_scale_factor=2)
    image = preview(pipe, packed, (16, 24))
    assert image.size == (24, 16)
    config, shape = wan_like.config, (1, 4, 1, 1, 1)
    plain = latents[:1] * torch.tensor(config.latents_std).view(shape)
    plain = plain + torch.tensor(config.latents_mean).view(shape)
    with torch.no_grad():
        expected = (wan_like.decode(plain).sample[0, :, 0] / 2 + 0.5).clamp(0, 1)
    assert expected.std() > 0.01
    assert (as_tensor(image) - expected).abs().max() < 0.51 / 255
    assert preview(pipe, packed, None) is None


def test_unknown_packings_have_no_preview(wan_like):
    packed = torch.randn(1, 24, 16)
    video = SimpleNamespace(vae=wan_like, _unpack_latents=diffusers.LTXPipeline._unpack_latents)
    assert preview(video, packed, (16, 24)) is None
    assert preview(SimpleNamespace(vae=wan_like), packed, (16, 24)) is None
    assert preview(SimpleNamespace(vae=wan_like), torch.randn(1, 4, 8, 8), None) is None
    assert preview(SimpleNamespace(), packed, (16, 24)) is None
