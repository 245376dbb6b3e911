"""Sums that no order changes, against closed forms and numpy; and what is near to what."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.evaluation import features
from trainer.evaluation.feature_sets import FeatureSet, nearest_distances, spread_evenly
from trainer.evaluation.features import IndexedExtraction, RandomConvFeatures
from trainer.evaluation.figures import Nearness
from trainer.evaluation.frechet import FrechetError, frechet_distance
from trainer.evaluation.precision import products_in
from trainer.evaluation.sums import FeatureSums
from trainer.host_group import HostGroup

ALONE = HostGroup(alone=True)
CPU = torch.device("cpu")


def random_features(count: int, size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(size, generator=generator) * 100
    return torch.randn(count, size, generator=generator) * spread + spread.flip(0)


def summed(parts, **options) -> FeatureSums:
    sums = FeatureSums(**options)
    for part in parts:
        sums.add(part)
    return sums


@given(st.integers(0, 99), st.integers(2, 300), st.integers(1, 50))
def test_no_order_and_no_batch_changes_a_bit_of_the_statistics(seed, count, batch):
    features = random_features(count, 5, seed)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    whole = summed([features]).statistics()
    parts = summed(torch.split(features[order], batch)).statistics()
    assert np.array_equal(parts.mean, whole.mean)
    assert np.array_equal(parts.covariance, whole.covariance)


def test_statistics_are_those_of_numpy_also_where_squares_cancel():
    features = random_features(700, 20, 1) + 4000
    wide, found = features.double().numpy(), summed([features]).statistics()
    np.testing.assert_allclose(found.mean, wide.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(found.covariance, np.cov(wide, rowvar=False), rtol=1e-11, atol=1e-9)


def test_the_largest_and_the_smallest_features_are_summed_exactly():
    # Quanta of 2^-30, at the bounds of both words, as often as a low word takes them and more.
    values = [2.0**13 - 2.0**-10, -(2.0**13) + 2.0**-10, 2.0**-30, -(2.0**-7) - 2.0**-30]
    features = torch.tensor(values, dtype=torch.float64).repeat(128 * 66, 1).reshape(-1, 2)
    sums = summed(torch.split(features, 128))
    found = sums.statistics()
    rows = [[Fraction(each) for each in row] for row in features.tolist()]
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    assert found.mean.tolist() == [float(each) for each in mean]
    for one in range(2):
        for two in range(2):
            product = sum((row[one] - mean[one]) * (row[two] - mean[two]) for row in rows)
            assert found.covariance[one, two] == float(product / (len(rows) - 1))


def test_the_distance_of_features_in_float32_is_that_of_numpy_to_a_millionth():
    one, two = random_features(300, 64, 1), random_features(400, 64, 2)
    found = frechet_distance(summed([one]).statistics(), summed([two]).statistics())
    a, b = one.double().numpy(), two.double().numpy()
    roots = np.linalg.eigvals(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False))
    wanted = (
        ((a.mean(0) - b.mean(0)) ** 2).sum()
        + np.trace(np.cov(a, rowvar=False))
        + np.trace(np.cov(b, rowvar=False))
        - 2 * np.sqrt(roots.astype(complex)).real.sum()
    )
    assert found == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize(
    ("features", "labels", "reason"),
    [
        ([[0.0, 1.0]], [0], "at least 2 images, got 1"),
        ([[0.0], [math.nan]], [0, 0], "of 1 images hold values that are not finite"),
        ([[0.0], [math.inf]], [0, 0], "not finite"),
        ([[0.0], [-9000.0]], [0, 0], "of 1 images reach 8192"),
        ([[0.0], [1.0]], [0, 2], "of 1 images are not among the 2 classes"),
    ],
)
def test_sums_refuse_what_they_cannot_summarise(features, labels, reason):
    sums = FeatureSums(classes=2)
    sums.add(torch.tensor(features), torch.tensor(labels))
    with pytest.raises(FrechetError, match=reason):
        sums.statistics()


def test_diversity_is_the_variance_within_classes():
    features, labels = random_features(90, 4, 3).double(), torch.arange(90) % 3
    sums = FeatureSums(classes=4)
    sums.add(features + 1000 * labels[:, None], labels)
    within = sum(
        ((features[labels == each] - features[labels == each].mean(0)) ** 2).sum()
        for each in range(3)
    )
    assert sums.within_class_variance() == pytest.approx(float(within / 87), rel=1e-9)
    same = FeatureSums(classes=3)
    same.add(torch.eye(3)[labels], labels)
    assert same.within_class_variance() == 0.0
    single = FeatureSums(classes=3)
    single.add(torch.eye(3), torch.arange(3))
    assert single.within_class_variance() is None


def test_features_are_of_float32_whatever_a_training_has_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    gpu, seen = torch.device("cuda"), []
    monkeypatch.setattr(features, "products_in", lambda precision, _: products_in(precision, gpu))

    def extractor(images: torch.Tensor) -> torch.Tensor:
        seen.append((matmul.allow_tf32, convolution.allow_tf32))
        return images.flatten(1)

    extraction = IndexedExtraction(extractor, device=CPU, take=Parts().take)
    with products_in("tf32", gpu):
        extraction.add(torch.zeros(40, 1, 2, 2), torch.arange(40) % 7, torch.arange(40))
        extraction.flush()
        assert matmul.allow_tf32
        assert convolution.allow_tf32
    assert seen == 2 * [(False, False)]


class Parts:
    """Takes what an extraction gives, by index."""

    def __init__(self) -> None:
        self.found: dict[int, torch.Tensor] = {}

    def take(self, features, labels, indices) -> None:
        for feature, label, index in zip(features, labels.tolist(), indices.tolist(), strict=True):
            assert label == index % 7
            assert index not in self.found
            self.found[index] = feature


@given(st.integers(0, 99), st.integers(1, 45), st.integers(1, 3))
def test_features_depend_on_image_and_index_alone_to_the_bit(seed, batch, ranks):
    images = torch.rand(100, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    indices = torch.arange(100)
    extractor, whole, parts = RandomConvFeatures(1), Parts(), Parts()
    alone = IndexedExtraction(extractor, device=CPU, take=whole.take)
    alone.add(images, indices % 7, indices)
    alone.flush()
    extractions = [IndexedExtraction(extractor, device=CPU, take=parts.take) for _ in range(ranks)]
    for turn, part in enumerate(torch.split(indices, batch)):
        extractions[turn % ranks].add(images[part], part % 7, part)
    for each in extractions:
        each.flush()
    assert sorted(parts.found) == list(range(100))
    assert all(torch.equal(parts.found[index], whole.found[index]) for index in range(100))
    seen = ((images * 127.5 + 127.5).round() - 127.5) / 127.5
    torch.testing.assert_close(
        torch.stack([whole.found[index] for index in range(100)]), extractor(seen)
    )


def test_an_image_that_is_not_finite_is_no_measurement_whatever_the_extractor_makes_of_it():
    parts = Parts()
    extraction = IndexedExtraction(
        lambda images: torch.zeros(len(images), 3), device=CPU, take=parts.take
    )
    images = torch.zeros(3, 1, 2, 2)
    images[1, 0, 0, 0] = math.nan
    extraction.add(images, torch.arange(3), torch.arange(3))
    extraction.flush()
    assert [bool(parts.found[index].isnan().all()) for index in range(3)] == [False, True, False]


@pytest.mark.parametrize(("total", "most"), [(0, 4), (3, 4), (10, 4), (10_000, 1000), (997, 996)])
def test_places_are_one_of_each_equal_part(total, most):
    places = spread_evenly(total, most)
    count = min(total, most)
    assert places.tolist() == sorted(set(places.tolist()))
    parts = torch.arange(count + 1) * total // max(1, count)
    assert ((parts[:-1] <= places) & (places < parts[1:])).all()
    assert len(places) == count


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_places_are_of_all_classes_alike_where_classes_take_turns(classes):
    places = spread_evenly(50_000, 1000)
    counts = torch.bincount(places % classes, minlength=classes).double()
    # Not more uneven than drawing by chance would be: chi squared has `classes` - 1 of freedom.
    expected = 1000 / classes
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < classes - 1 + 4 * (2 * (classes - 1)) ** 0.5


def test_a_set_sums_and_keeps_what_it_was_told_to():
    features = random_features(9, 2, 0)
    whole = FeatureSet(classes=1, kept=torch.tensor([1, 8]), summed=torch.tensor([0, 1, 2]))
    for part in (torch.tensor([8, 0, 3]), torch.tensor([1, 2])):
        whole.take(features[part], torch.zeros(len(part)).long(), part)
    assert whole.sums.count == 3
    assert torch.equal(whole.kept(), features[[8, 1]])
    assert torch.equal(whole.kept(torch.tensor([1])), features[[1]])
    assert torch.equal(whole.gather(ALONE, torch.tensor([1, 8])), features[[1, 8]])
    assert torch.equal(whole.gather(ALONE, torch.tensor([8])), features[[8]])


def test_the_nearest_of_many_is_found_and_copies_are_counted():
    everything = random_features(1600, 8, 4)
    train, held_out, fresh = torch.split(everything, [600, 500, 500])
    found = nearest_distances(held_out, train, ranks=ALONE)
    wanted = (held_out.double()[:, None] - train.double()[None]).norm(dim=2).amin(1)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    parts = [
        nearest_distances(held_out[7:9], part, ranks=ALONE)
        for part in torch.split(train, [100, 500])
    ]
    assert torch.equal(torch.minimum(*parts), found[7:9])
    # A rank may have none of them.
    nothing = nearest_distances(held_out, torch.zeros(0, 0), ranks=ALONE)
    assert nothing.isinf().all()
    new = Nearness.of(nearest_distances(fresh, train, ranks=ALONE), held_out=found)
    assert new.close_share < 0.05
    copied = torch.cat((fresh[:350], train[:150] + 1e-3))
    copies = Nearness.of(nearest_distances(copied, train, ranks=ALONE), held_out=found)
    assert 0.3 <= copies.close_share < 0.35
    assert copies.mean < new.mean
