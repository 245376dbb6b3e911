"""Some of the faults of `make chaos`, on one run; and how their choice and cost are told."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.chaos.campaign import SPACING, Incident, Story, digest, length, plan, run_through
from tests.chaos.faults import FAULTS
from tests.chaos.picture import save_timeline
from tests.chaos.stand import INTERVAL, run_undisturbed, stand
from tests.chaos.watch import Mark
from tests.support.hosts import why_not

# A killed rank is in tests/integration/test_job.py, to the bit too.
HELD = ("power cut", "network cut")
SEED = 18


def incident(**changes: object) -> Incident:
    """A fault that was survived as it should be."""
    usual = {
        **{"name": "power cut", "what": "left was off", "time": 10.0, "recovered": 40.0},
        **{"saved": 1280, "silence_s": 25.0, "lost": 300, "starts": 1, "earliest": 1280},
        "helped": False,
    }
    return Incident(**{**usual, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 3, 13, 30])
def test_a_plan_has_every_kind_before_any_twice_and_a_span_for_each(count: int) -> None:
    chosen = plan(5, count)
    assert chosen == plan(5, count)
    assert chosen != plan(6, count)
    first = [each.name for each in chosen[: len(FAULTS)]]
    assert len(set(first)) == len(first)
    for place, each in enumerate(chosen):
        assert SPACING * place < each.images < SPACING * (place + 0.5)


def test_what_is_lost_beyond_what_was_not_saved_is_a_problem() -> None:
    assert incident().problems() == []
    assert incident(starts=0, earliest=None, lost=0).problems() == []
    assert "went back to 0 images though 1,280 were saved" in incident(earliest=0).problems()[0]
    assert "lost 1,025 images" in incident(lost=2 * INTERVAL + 1).problems()[0]
    announced = incident(lost=64, announced=True).problems()
    assert announced == ["power cut: lost 64 images though there was time to save"]
    assert incident(lost=0, announced=True).problems() == []
    assert "had to be given again" in incident(helped=True).problems()[0]


@pytest.mark.slow  # the first picture of a process
def test_a_story_has_a_table_and_a_picture(tmp_path: Path) -> None:
    story = Story(
        began=0.0,
        ended=60.0,
        incidents=[incident(), incident(silence_s=30.0, lost=512), incident(name="rank killed")],
        marks=[Mark(5.0, 256), Mark(9.0, 1536), Mark(38.0, 1280, resumed=True), Mark(40.0, 1792)],
    )
    rows = story.table().splitlines()
    assert [row.split() for row in rows[1:]] == [
        ["rank", "killed", "1", "25.0", "300", "1"],
        ["power", "cut", "2", "25.0", "to", "30.0", "512", "2"],
    ]
    save_timeline(story, tmp_path / "chaos.png")
    assert (tmp_path / "chaos.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
def test_a_run_on_three_hosts_survives_faults_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    images = length(len(HELD))
    (undisturbed := tmp_path / "undisturbed").mkdir()
    (shared := tmp_path / "shared").mkdir()
    plans = plan(SEED, len(HELD), names=HELD)
    with ThreadPoolExecutor(1) as beside:
        # While hosts start, and while faults last, processors are idle.
        reference = beside.submit(run_undisturbed, undisturbed, images=images)
        with stand(shared, images=images) as there:
            story = run_through(there, plans, images=images, seconds=1200, report=print)
        reference.result()
    assert story.problems == []
    assert [each.name for each in story.incidents] == [each.name for each in plans]
    # Each of them ended the attempt, so the run was set back, and trained what it lost again.
    assert all(each.starts for each in story.incidents if each.name != "network cut")
    assert digest(shared) == digest(undisturbed)
