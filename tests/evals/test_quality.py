"""PSNR and SSIM against slow loops and known values."""

from __future__ import annotations

import math

import pytest
import torch

from mmattn.evals.quality import IDENTICAL_DB, decibels, flicker, psnr, ssim


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_psnr_of_a_constant_offset():
    a = torch.zeros(2, 3, 8, 8)
    b = a.clone()
    b[1] += 0.1
    assert psnr(b, a)[0] == IDENTICAL_DB
    assert math.isclose(psnr(b, a)[1].item(), 20.0, abs_tol=1e-4)


def test_rows_do_not_depend_on_each_other():
    a, b = rand(3, 3, 16, 16), rand(3, 3, 16, 16, seed=1)
    for measure in (psnr, ssim):
        alone = torch.cat([measure(a[i : i + 1], b[i : i + 1]) for i in range(3)])
        assert torch.allclose(measure(a, b), alone)


def test_ssim_equals_a_loop():
    a, b = rand(1, 2, 14, 13), rand(1, 2, 14, 13, seed=1)
    axis = torch.arange(11).double() - 5
    bell = torch.exp(-(axis**2) / (2 * 1.5**2))
    weight = torch.outer(bell, bell) / bell.sum() ** 2
    values = []
    for c in range(2):
        for y in range(14 - 10):
            for x in range(13 - 10):
                p = a[0, c, y : y + 11, x : x + 11].double()
                q = b[0, c, y : y + 11, x : x + 11].double()
                mp, mq = (weight * p).sum(), (weight * q).sum()
                vp, vq = (weight * (p - mp) ** 2).sum(), (weight * (q - mq) ** 2).sum()
                cov = (weight * (p - mp) * (q - mq)).sum()
                top = (2 * mp * mq + 1e-4) * (2 * cov + 9e-4)
                values.append(top / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    assert math.isclose(ssim(a, b).item(), torch.stack(values).mean().item(), abs_tol=1e-6)


def test_ssim_is_one_for_equal_clips_and_lower_for_noise():
    clip = rand(2, 3, 4, 16, 16)
    assert torch.allclose(ssim(clip, clip), torch.ones(2))
    assert (ssim((clip + 0.3 * rand(*clip.shape, seed=2)).clamp(0, 1), clip) < 0.95).all()


def test_flicker_of_a_still_and_of_a_blink():
    still = rand(1, 3, 1, 8, 8).expand(-1, -1, 5, -1, -1)
    assert flicker(still).item() == 0
    blink = torch.zeros(1, 3, 4, 8, 8)
    blink[:, :, 1::2] = 1
    assert flicker(blink).item() == 1


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="one shape"):
        psnr(rand(1, 3, 8, 8), rand(1, 3, 8, 9))
    with pytest.raises(ValueError, match="does not fit"):
        ssim(rand(1, 3, 8, 8), rand(1, 3, 8, 8))


def test_decibels_for_people():
    assert decibels(IDENTICAL_DB) == "identical"
    assert decibels(31.44) == "31.4 dB"
