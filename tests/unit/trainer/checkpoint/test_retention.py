"""Retention never deletes the newest valid checkpoint, nor anything that is in use."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.checkpoint import layout
from trainer.checkpoint.retention import expired, remains
from trainer.checkpoint.saver import CheckpointConfig

QUICK = settings(max_examples=100, deadline=None)
CHECKPOINTS = st.dictionaries(st.integers(0, 30), st.booleans(), max_size=12)


@QUICK
@given(CHECKPOINTS, st.integers(1, 5), st.data())
def test_what_is_kept(found: dict[int, bool], keep_last: int, data: st.DataObject) -> None:
    saved = data.draw(st.sampled_from(sorted(found))) if found else 0
    gone = expired(found, keep_last=keep_last, saved=saved)
    valid = sorted((images for images, good in found.items() if good), reverse=True)
    assert not set(gone) & set(valid[:keep_last])
    assert saved not in gone
    assert gone == sorted(gone)
    assert set(gone) <= set(found)
    if valid:
        assert valid[0] not in gone
        assert set(valid[keep_last:]) - {saved} <= set(gone)


@QUICK
@given(CHECKPOINTS)
def test_nothing_goes_before_there_is_something_valid(found: dict[int, bool]) -> None:
    nothing_valid = dict.fromkeys(found, False)
    assert expired(nothing_valid, keep_last=1, saved=0) == []


def test_damaged_ones_go_when_they_are_older_than_all_that_is_kept() -> None:
    found = {10: False, 20: True, 30: False, 40: True, 50: False}
    assert expired(found, keep_last=2, saved=40) == [10]
    assert expired(found, keep_last=1, saved=40) == [10, 20, 30]


def test_remains_are_older_unused_content_of_this_run() -> None:
    def content(images: int, attempt: str) -> str:
        return layout.object_key("run", images, attempt, 0)

    keys = {
        content(10, "used"): False,
        content(10, "lost"): True,
        content(20, "dead"): True,
        content(30, "used"): False,
        content(30, "racing"): False,
        content(40, "underway"): False,
        layout.manifest_key("run", 10): False,
        "run/samples/000000000010/grid.png": False,
        "run/checkpoints/notes.txt": False,
    }
    found = remains(keys, run="run", used={content(10, "used"), content(30, "used")}, committed=30)
    assert found == sorted(key for key, expected in keys.items() if expected)


@pytest.mark.parametrize("settings", [{"keep_last": 0}, {"interval_images": -1}])
def test_settings_that_would_lose_the_run_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"checkpoint\."):
        CheckpointConfig(**settings)
