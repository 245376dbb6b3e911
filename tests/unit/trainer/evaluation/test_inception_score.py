"""The Inception Score as sums, and what a set keeps of its images."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.evaluation.feature_sets import FeatureSet, spread_evenly
from trainer.evaluation.layout import Layout
from trainer.evaluation.scores import SPLIT_SIZE, ScoreSums
from trainer.host_group import HostGroup

ALONE = HostGroup(alone=True)


def logits(count: int, classes: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, classes, generator=generator) * 3


def directly(values: torch.Tensor) -> float:
    """The mean over splits of exp(mean KL), as ADM's evaluation computes it."""
    scores = []
    for part in values.double().softmax(dim=1).split(SPLIT_SIZE):
        divergence = (part * (part.log() - part.mean(0).log())).sum(1)
        scores.append(math.exp(divergence.mean()))
    return sum(scores) / len(scores)


@pytest.mark.parametrize("count", [1, 70, SPLIT_SIZE, 2 * SPLIT_SIZE + 300])
def test_the_score_is_the_mean_over_splits_of_five_thousand(count):
    sums = ScoreSums()
    sums.add(logits(count, 10), torch.arange(count))
    sums.reduce(ALONE)
    assert sums.score() == pytest.approx(directly(logits(count, 10)), rel=1e-9)


def test_one_class_each_is_the_number_of_classes_and_all_alike_is_one():
    sure, same = ScoreSums(), ScoreSums()
    sure.add(torch.eye(8).repeat(5, 1) * 1000, torch.arange(40))
    same.add(torch.zeros(40, 8), torch.arange(40))
    assert sure.score() == pytest.approx(8, rel=1e-9)
    assert same.score() == pytest.approx(1, rel=1e-9)
    assert ScoreSums().score() is None


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 99), st.integers(1, 60))
def test_no_order_and_no_batch_changes_a_bit_of_the_score(seed, batch):
    values, places = logits(150, 6, seed), torch.arange(150) + SPLIT_SIZE - 70
    order = torch.randperm(150, generator=torch.Generator().manual_seed(seed))
    whole, parts = ScoreSums(), ScoreSums()
    whole.add(values, places)
    for part in torch.split(order, batch):
        parts.add(values[part], places[part])
    assert parts.score() == whole.score()


def size_bytes(images: FeatureSet) -> int:
    """Bytes of all tensors that a set holds."""
    held = [vars(images), vars(images.sums), vars(images.spatial), vars(images.scores)]
    tensors = [each for values in held for each in values.values() if torch.is_tensor(each)]
    tensors += [tensor for pair in images._kept for tensor in pair]
    return sum(each.untyped_storage().nbytes() for each in tensors)


def test_a_set_takes_no_more_memory_for_ten_times_the_images():
    layout, sizes = Layout(spatial=12, logits=5), []
    for count in (300, 3000):
        kept = spread_evenly(count, 200)
        images = FeatureSet(classes=3, kept=kept, layout=layout)
        for indices in torch.split(torch.arange(count), 64):
            images.take(logits(len(indices), 37), indices % 3, indices)
        assert images.kept().shape == (200, 20)
        sizes.append(size_bytes(images) - images._chosen.untyped_storage().nbytes())
    assert sizes[0] == sizes[1]
