"""Views: always inside the image, of the area and shape asked for, and a function of the sample."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.augment import DRAWS, AugmentConfig, SampleKey, sample_crop
from pipelines.domains import SettingError

QUICK = settings(max_examples=300, deadline=None)
SIDES = st.integers(1, 3000)
NUMBERS = st.lists(st.floats(0, 1, exclude_max=True), min_size=DRAWS, max_size=DRAWS).map(np.array)


@QUICK
@given(SIDES, SIDES, NUMBERS, st.floats(0.01, 1), st.floats(1, 4), st.booleans())
def test_a_random_part_lies_inside_with_its_area_and_shape(
    width: int, height: int, numbers: np.ndarray, min_area: float, max_aspect: float, flip: bool
) -> None:
    config = AugmentConfig(
        flip=flip, crop="random_resized", min_area=min_area, max_aspect=max_aspect
    )
    crop = sample_crop(config, width=width, height=height, numbers=numbers)
    assert 0 <= crop.left <= crop.left + crop.width <= width
    assert 0 <= crop.top <= crop.top + crop.height <= height
    assert crop.width >= 1
    assert crop.height >= 1
    if not flip:
        assert not crop.mirrored
    # Half a pixel of rounding on each side; below that a part has no shape of its own.
    if min(crop.width, crop.height) > 1:
        ratio = (crop.width + 0.5) / (crop.height - 0.5)
        assert ratio >= 1 / max_aspect
        ratio = (crop.width - 0.5) / (crop.height + 0.5)
        assert ratio <= max_aspect


@QUICK
@given(SIDES, SIDES, NUMBERS, st.booleans())
def test_the_centre_is_central(width: int, height: int, numbers: np.ndarray, flip: bool) -> None:
    crop = sample_crop(AugmentConfig(flip=flip), width=width, height=height, numbers=numbers)
    side = min(width, height)
    assert (crop.width, crop.height) == (side, side)
    assert abs(2 * crop.left + side - width) <= 1
    assert abs(2 * crop.top + side - height) <= 1
    assert crop.mirrored == (flip and numbers[0] < 0.5)
    still = sample_crop(AugmentConfig(flip=flip), width=width, height=height, numbers=None)
    assert not still.mirrored


def test_numbers_belong_to_seed_epoch_and_sample_and_are_uniform() -> None:
    assert (SampleKey(1, 2, 3).uniforms(5) == SampleKey(1, 2, 3).uniforms(5)).all()
    keys = [SampleKey(s, e, i) for s in (0, 1) for e in (0, 1) for i in range(500)]
    several = [key.uniforms(5) for key in keys]
    numbers = np.stack(several)
    assert len(np.unique(numbers)) == numbers.size
    assert (numbers >= 0).all()
    assert (numbers < 1).all()
    # Five standard errors of the mean and of the share below a half.
    assert np.abs(numbers.mean(0) - 0.5).max() < 5 / np.sqrt(12 * len(numbers))
    assert abs((numbers[:, 0] < 0.5).mean() - 0.5) < 5 / np.sqrt(4 * len(numbers))


@pytest.mark.parametrize(
    "choices", [{"crop": "left"}, {"min_area": 0.0}, {"min_area": 1.5}, {"max_aspect": 0.5}]
)
def test_impossible_augmentations_are_refused(choices: dict[str, float]) -> None:
    with pytest.raises(SettingError, match=f"{next(iter(choices))}=.* must"):
        AugmentConfig(**choices)
