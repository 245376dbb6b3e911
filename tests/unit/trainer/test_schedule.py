"""Learning rates: the declared shape at its corners, and never above the peak."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.engine.optimizer import OptimConfig, learning_rate

COSINE = OptimConfig(learning_rate=2.0, warmup_images=100, decay="cosine", final_ratio=0.1)


@pytest.mark.parametrize(
    ("images", "expected"),
    [(0, 0.02), (49, 1.0), (99, 2.0), (100, 2.0), (600, 1.1), (1100, 0.2), (5000, 0.2)],
)
def test_warm_up_then_cosine(images, expected):
    assert learning_rate(COSINE, images=images, total_images=1100) == pytest.approx(expected)


def test_the_default_is_constant_from_the_first_update():
    config = OptimConfig()
    assert {learning_rate(config, images=n, total_images=10) for n in (0, 5, 10, 99)} == {1e-4}


@given(images=st.integers(0, 10**9), total=st.integers(1, 10**9), warmup=st.integers(0, 10**6))
def test_rates_stay_between_zero_and_the_peak(images, total, warmup):
    config = OptimConfig(learning_rate=1.0, warmup_images=warmup, decay="cosine")
    assert 0.0 <= learning_rate(config, images=images, total_images=total) <= 1.0
