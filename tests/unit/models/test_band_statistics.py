"""Moments of the bands, against closed forms."""

import pytest
import torch

from models.pyramid import band_statistics, split


def test_a_residual_has_mean_zero_and_the_coarsest_the_images_mean() -> None:
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) + 2
    statistics = band_statistics(split(images, 3))
    assert statistics.mean[0].item() == pytest.approx(images.mean().item())
    torch.testing.assert_close(statistics.mean[1:], torch.zeros(2), atol=1e-6, rtol=0)


def test_variances_add_up_to_that_of_the_images() -> None:
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    statistics = band_statistics(split(images, 3))
    # Bands are orthogonal, and each has four times the elements of the one before.
    total = statistics.std.square().sum()
    torch.testing.assert_close(total, images.var(correction=0))


def test_white_noise_has_the_known_share_in_every_band() -> None:
    noise = torch.randn(64, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    variances = band_statistics(split(noise, 3)).std.square()
    torch.testing.assert_close(variances, torch.tensor([1 / 16, 3 / 16, 3 / 4]), rtol=0.02, atol=0)
