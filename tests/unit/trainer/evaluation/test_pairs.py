"""Figures of pairs of images against torch-fidelity and closed forms, and what must not matter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.evaluation.features import RandomConvFeatures
from trainer.evaluation.frechet import frechet_distance
from trainer.evaluation.pairs import ComparedImages, Coverage, coverage, kernel_distance
from trainer.evaluation.sliced import sliced_wasserstein
from trainer.evaluation.sums import FeatureSums
from trainer.host_group import HostGroup

ALONE = HostGroup(alone=True)
CPU = torch.device("cpu")


def compared(features: torch.Tensor) -> ComparedImages:
    return ComparedImages(features, ranks=ALONE, device=CPU)


def drawn(count: int, size: int, seed: int, *, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=generator).abs() + shift


def figures(samples: torch.Tensor, real: torch.Tensor) -> tuple[float, Coverage | None, float]:
    one, two = compared(samples), compared(real)
    return kernel_distance(one, two), coverage(one, two), sliced_wasserstein(one, two)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 2000.0])
@pytest.mark.parametrize(("count", "size"), [(60, 64), (200, 7), (1100, 16)])
def test_pairs_are_those_of_torch_fidelity(count, size, scale):
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    samples = drawn(count, size, 1, shift=0.1) * scale
    real = drawn(count, size, 2) * scale
    kernel, covered, _ = figures(samples, real)
    told = kid_features_to_metric(
        samples.double(), real.double(), kid_subsets=1, kid_subset_size=count, verbose=False
    )
    assert kernel == pytest.approx(told["kernel_inception_distance_mean"], rel=1e-6, abs=1e-15)
    precision, recall = calculate_precision_recall_full(samples.double(), real.double(), 3)
    assert covered is not None
    assert (covered.precision, covered.recall) == pytest.approx((precision, recall), rel=1e-6)
    assert 0 < covered.precision < 1


def test_sets_of_several_sizes_are_compared():
    samples, real = drawn(40, 9, 1, shift=0.2), drawn(1500, 9, 2)
    kernel, covered, _ = figures(samples, real)
    x, y = samples.double(), real.double()
    own = [
        (((a @ a.T / 9 + 1) ** 3).sum() - ((a * a).sum(1) / 9 + 1).pow(3).sum())
        / (len(a) * (len(a) - 1))
        for a in (x, y)
    ]
    wanted = own[0] + own[1] - 2 * ((x @ y.T / 9 + 1) ** 3).mean()
    assert kernel == pytest.approx(float(wanted), rel=1e-7)
    radii = [torch.cdist(a, a).kthvalue(4).values for a in (x, y)]
    across = torch.cdist(x, y)
    assert covered == Coverage(
        precision=float((across <= radii[1]).any(1).double().mean()),
        recall=float((across <= radii[0][:, None]).any(0).double().mean()),
    )


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 99), st.integers(4, 90), st.integers(4, 90))
def test_no_order_changes_a_bit(seed, n, m):
    samples, real = drawn(n, 12, seed, shift=0.3), drawn(m, 12, seed + 100)
    generator = torch.Generator().manual_seed(seed)
    mixed = [a[torch.randperm(len(a), generator=generator)] for a in (samples, real)]
    assert figures(samples, real) == figures(*mixed)


def test_an_image_of_both_sets_is_in_its_own_ball_and_three_images_have_none():
    real = drawn(50, 5, 3)
    assert coverage(compared(real), compared(real)) == Coverage(precision=1.0, recall=1.0)
    # Nothing lies in an empty ball.
    far = coverage(compared(real + 1000), compared(real))
    assert far == Coverage(precision=0.0, recall=0.0)
    assert coverage(compared(real[:3]), compared(real)) is None
    assert coverage(compared(real), compared(real[:3])) is None
    dropped = compared(real[:25])
    half = coverage(dropped, compared(real))
    assert half is not None
    assert half.precision == 1.0
    assert 0.5 <= half.recall < 1


def test_a_shift_costs_its_squared_length():
    features = drawn(300, 32, 4)
    shift = torch.linspace(0, 1, 32)
    found = sliced_wasserstein(compared(features + shift), compared(features))
    # The mean over directions of a squared projection, which 1,024 know to a few per cent.
    assert found == pytest.approx(float(shift.square().sum()), rel=0.15)
    assert sliced_wasserstein(compared(features), compared(features)) == 0.0


def test_the_distance_on_a_line_is_that_of_quantiles():
    one, two = drawn(6, 1, 5), drawn(4, 1, 6)
    found = sliced_wasserstein(compared(one), compared(two))
    # Each repeated until there are as many.
    a = np.sort(np.repeat(one.double().numpy().ravel(), 4))
    b = np.sort(np.repeat(two.double().numpy().ravel(), 6))
    assert found == pytest.approx(((a - b) ** 2).mean(), rel=1e-6)


def test_few_samples_flatter_the_sliced_distance_less_than_they_spoil_the_frechet_distance():
    """What 200 samples of the same distribution seem to be away, as a share of a real shift."""
    real, same = drawn(4000, 128, 1), drawn(200, 128, 2)
    moved = same + 0.05

    def frechet(samples: torch.Tensor) -> float:
        sums = FeatureSums(), FeatureSums()
        for each, features in zip(sums, (samples, real), strict=True):
            each.add(features)
        return frechet_distance(sums[0].statistics(), sums[1].statistics())

    def sliced(samples: torch.Tensor) -> float:
        return sliced_wasserstein(compared(samples), compared(real))

    assert sliced(same) / (sliced(moved) - sliced(same)) < 3
    assert frechet(same) / (frechet(moved) - frechet(same)) > 30


def blurred(images: torch.Tensor, times: int) -> torch.Tensor:
    for _ in range(times):
        images = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return images


def test_figures_are_worse_the_more_pictures_are_blurred_and_bad_for_noise():
    generator = torch.Generator().manual_seed(8)
    coarse = torch.rand(600, 3, 5, 5, generator=generator) * 2 - 1
    pictures = F.interpolate(coarse, size=16, mode="bicubic").clamp(-1, 1)
    real, fresh = pictures.split(300)
    noise = torch.rand(300, 3, 16, 16, generator=generator) * 2 - 1
    extract = RandomConvFeatures(3)
    target, told = extract(real), []
    for shown in (real, fresh, *(blurred(fresh, times) for times in (1, 2, 4, 8)), noise):
        sums = FeatureSums(), FeatureSums()
        for each, features in zip(sums, (extract(shown), target), strict=True):
            each.add(features)
        distance = frechet_distance(sums[0].statistics(), sums[1].statistics())
        kernel, covered, sliced = figures(extract(shown), target)
        assert covered is not None
        told.append((distance, kernel, sliced, -covered.precision))
    same, *blurs, of_noise = told
    assert same[0] == pytest.approx(0, abs=1e-6)
    assert same[2:] == (0.0, -1.0)
    assert same[1] < 0  # without bias: the mean over samples is 0
    for figure in zip(*blurs, strict=True):
        assert list(figure) == sorted(figure)
    assert blurs[-1][0] > 50 * blurs[0][0]
    for noisy, fresh_one in zip(of_noise[:3], blurs[0][:3], strict=True):
        assert noisy > 10 * fresh_one
    assert of_noise[3] == 0
