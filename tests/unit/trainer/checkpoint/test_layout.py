"""Keys: where things lie, what is refused, and back from a key to its checkpoint."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.checkpoint import layout
from trainer.storage.errors import InvalidKey

QUICK = settings(max_examples=50, deadline=None)
RUN_NAMES = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True)
IMAGES = st.integers(0, layout.MAX_IMAGES)


def test_the_layout_is_the_documented_one() -> None:
    assert layout.manifest_key("night-1", 4096) == (
        "night-1/checkpoints/000000004096/MANIFEST.json"
    )
    assert layout.object_key("night-1", 4096, "c0ffee", 3) == (
        "night-1/checkpoints/000000004096/c0ffee/rank-00003.safetensors"
    )
    assert layout.tensor_key("ema", "scales.0.bias", 12) == "ema/scales.0.bias@12"


@QUICK
@given(RUN_NAMES, IMAGES, st.from_regex(r"[a-f0-9]{12}", fullmatch=True), st.integers(0, 99999))
def test_keys_are_safe_and_lead_back(run: str, images: int, attempt: str, rank: int) -> None:
    for key in (
        layout.manifest_key(run, images),
        layout.object_key(run, images, attempt, rank),
    ):
        assert layout.check_key(key) == key
        assert key.startswith(layout.checkpoints_prefix(run))
        assert layout.images_of(run, key) == images
        assert layout.images_of(run + "x", key) is None


@QUICK
@given(RUN_NAMES, st.lists(IMAGES, min_size=2, max_size=5))
def test_keys_sort_by_images(run: str, images: list[int]) -> None:
    keys = [layout.checkpoint_key(run, each) for each in sorted(images)]
    assert keys == sorted(keys)


@pytest.mark.parametrize(
    "key",
    [
        "night-1/checkpoints/4096/MANIFEST.json",
        "night-1/checkpoints/000000004096",
        "night-1/checkpoints/notes/x",
        "night-1/samples/000000004096/x",
        "checkpoints/000000004096/MANIFEST.json",
    ],
)
def test_other_keys_belong_to_no_checkpoint(key: str) -> None:
    assert layout.images_of("night-1", key) is None


@pytest.mark.parametrize("run", ["", "../x", "a b", ".hidden", "/a", "a/../b", "ü"])
def test_unsafe_run_names_are_refused(run: str) -> None:
    with pytest.raises(InvalidKey, match="cannot name an object"):
        layout.manifest_key(run, 1)


@pytest.mark.parametrize("images", [-1, 10**12])
def test_impossible_positions_are_refused(images: int) -> None:
    with pytest.raises(InvalidKey, match=str(images)):
        layout.checkpoint_key("run", images)
