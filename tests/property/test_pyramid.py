"""Identities of the Laplacian pyramid."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.pyramid import PyramidError, down, merge, split, up

SCALES = st.integers(1, 4)
QUICK = settings(max_examples=40, deadline=None)


def draw_image(scales: int, tiles: tuple[int, int], channels: int, seed: int) -> torch.Tensor:
    """Whole numbers in 0..255: every mean of them is exact in floating point."""
    height, width = (tile * 2 ** (scales - 1) for tile in tiles)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (2, channels, height, width), generator=generator).float()


IMAGES = st.tuples(
    SCALES,
    st.builds(
        draw_image,
        st.just(4),
        st.tuples(st.integers(1, 3), st.integers(1, 3)),
        st.integers(1, 3),
        st.integers(0, 2**32),
    ),
)


@QUICK
@given(IMAGES)
def test_round_trip_is_exact(drawn: tuple[int, torch.Tensor]) -> None:
    scales, image = drawn
    bands = split(image, scales)
    assert len(bands) == scales
    assert torch.equal(merge(bands), image)


@QUICK
@given(IMAGES)
def test_round_trip_of_normalised_pixels_is_exact_to_rounding(
    drawn: tuple[int, torch.Tensor],
) -> None:
    scales, image = drawn
    normalised = image / 127.5 - 1
    torch.testing.assert_close(merge(split(normalised, scales)), normalised, rtol=0, atol=5e-7)


@QUICK
@given(IMAGES)
def test_blocks_of_residual_bands_sum_to_zero(drawn: tuple[int, torch.Tensor]) -> None:
    scales, image = drawn
    for band in split(image, scales)[1:]:
        assert torch.equal(down(band), torch.zeros_like(down(band)))


@QUICK
@given(IMAGES)
def test_bands_are_orthogonal(drawn: tuple[int, torch.Tensor]) -> None:
    scales, image = drawn
    bands = split(image.double(), scales)
    full = []
    for position, band in enumerate(bands):
        at_full_size = band
        for _ in range(scales - 1 - position):
            at_full_size = up(at_full_size)
        full.append(at_full_size.flatten())
    gram = torch.stack(full) @ torch.stack(full).T
    assert torch.equal(gram, gram.diagonal().diag())
    torch.testing.assert_close(gram.trace(), image.double().square().sum(), rtol=1e-14, atol=0)


@QUICK
@given(IMAGES)
def test_the_coarsest_band_is_the_mean_over_its_blocks(drawn: tuple[int, torch.Tensor]) -> None:
    scales, image = drawn
    block = 2 ** (scales - 1)
    coarse = split(image, scales)[0]
    means = image.unfold(2, block, block).unfold(3, block, block).mean(dim=(-1, -2))
    torch.testing.assert_close(coarse, means, rtol=1e-6, atol=0)


@QUICK
@given(IMAGES, st.floats(-3, 3), st.integers(0, 100))
def test_splitting_is_linear(drawn: tuple[int, torch.Tensor], factor: float, seed: int) -> None:
    scales, image = drawn
    image = image.double()
    other = torch.randn(
        image.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    joint = split(image + factor * other, scales)
    for got, first, second in zip(joint, split(image, scales), split(other, scales), strict=True):
        torch.testing.assert_close(got, first + factor * second, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("height", "width", "scales"), [(6, 8, 3), (8, 6, 3), (7, 7, 2), (2, 2, 3), (8, 8, 0)]
)
def test_sizes_that_cannot_be_halved_are_refused(height: int, width: int, scales: int) -> None:
    with pytest.raises(PyramidError):
        split(torch.zeros(1, 1, height, width), scales)


def test_bands_that_do_not_follow_each_other_are_refused() -> None:
    coarse, middle, fine = split(torch.zeros(1, 1, 8, 8), 3)
    with pytest.raises(PyramidError, match="follow each other"):
        merge((coarse, fine))
    with pytest.raises(PyramidError, match="follow each other"):
        merge((fine, middle, coarse))
    with pytest.raises(PyramidError, match="without bands"):
        merge(())
