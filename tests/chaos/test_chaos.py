"""Some of the faults of `make chaos`, on one run; and how their choice and cost are told."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.chaos.campaign import (
    SPACING,
    Incident,
    Story,
    digest,
    length,
    plan,
    run_through,
    settle,
)
from tests.chaos.faults import FAULTS
from tests.chaos.picture import save_timeline
from tests.chaos.stand import INTERVAL, run_undisturbed, stand
from tests.chaos.watch import Mark, Watch
from tests.support.hosts import why_not

# One without a word, one that is announced, one that is waited through. A killed rank is in
# tests/integration/test_job.py, to the bit too.
HELD = ("power cut", "node terminated", "network cut")
SEED = 622
"""The two that end an attempt come first, between two saves: while the network is away, a run may
train to its end."""


def incident(**changes: object) -> Incident:
    """A fault that was survived as it should be."""
    usual = {
        **{"name": "power cut", "what": "left was off", "time": 10.0, "recovered": 40.0},
        **{"saved": 1280, "silence_s": 25.0, "lost": 300, "at_risk": 300, "starts": 1},
        **{"earliest": 1280, "helped": False},
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
    assert "lost 301 images in 1 starts, where 300" in incident(lost=301).problems()[0]
    announced = incident(lost=64, announced=True).problems()
    assert announced == ["power cut: lost 64 images though there was time to save"]
    assert incident(lost=0, announced=True).problems() == []
    unheard = incident(lost=0, starts=0, earliest=None, announced=True).problems()
    assert unheard == ["power cut: the run came to its end and did not heed the notice"]
    assert "had to be given again" in incident(helped=True).problems()[0]


def told(folder: Path, *lines: str) -> Mark:
    """Where a run went on that told these lines, one after the other."""
    (log := folder / "driver.log").write_text("".join(f"{line}\n" for line in lines))
    (watch := Watch(log)).close()
    (mark,) = (mark for mark in watch.marks if mark.resumed)
    return mark


def test_what_is_lost_is_counted_to_the_image_by_what_the_run_tells(tmp_path: Path) -> None:
    begins = ("64/9,999 images (1%)", "512/9,999 images (5%)")
    saved = "2026-11-30 10:00:00Z attempt 0: rank 0: checkpoint: file:///store/runs/digits/checkpoints/000000000512"
    failed = "2026-11-30 10:00:00Z attempt 0: {}; 704 images were trained, 512 images are saved; …"
    back = "resumed after 512 images from file:///store/runs/digits/checkpoints/000000000512"

    seen = told(tmp_path, *begins, saved, "640/9,999 images (6%)", back)
    assert (seen.reached, seen.saved, seen.lost, seen.at_risk(INTERVAL)) == (640, 512, 128, 128)
    # The last update was told by another worker than the one that tells of each.
    seen = told(tmp_path, *begins, saved, "640/9,999 images (6%)", failed.format("…"), back)
    assert (seen.reached, seen.lost, seen.at_risk(INTERVAL)) == (704, 192, 192)
    # A node that is taken without a save.
    left = failed.format("all workers left, since right is taken away in 28 s")
    assert told(tmp_path, *begins, saved, "704/9,999 images (7%)", left, back).lost == 192
    # What was lost may have an interval more only while its save is on its way.
    late = ("1,024/9,999 images (10%)", "1,088/9,999 images (11%)")
    seen = told(tmp_path, *begins, saved, *late, back)
    assert (seen.lost, seen.at_risk(INTERVAL)) == (576, 576)
    seen = told(tmp_path, *begins, saved, *late, saved.replace("0512", "1024"), back)
    assert (seen.lost, seen.at_risk(INTERVAL)) == (576, 64)
    seen = told(tmp_path, *begins, *late, back)
    assert (seen.lost, seen.at_risk(INTERVAL)) == (576, 576)
    # Without a checkpoint it says nothing about where it begins.
    seen = told(tmp_path, *begins, saved, "64/9,999 images (1%)")
    assert (seen.images, seen.lost, seen.at_risk(INTERVAL)) == (0, 512, 0)


def test_a_fault_that_a_run_notices_late_costs_what_it_costs_then() -> None:
    """As memory that is spoiled: the run trains on, and is set back before the next fault."""
    noticed = [
        *(Mark(9.0, 2048), Mark(10.5, 2112), Mark(11.0, 2176)),
        Mark(28.0, 2048, resumed=True, reached=2176, saved=2048),
        *(Mark(30.0, 2112), Mark(31.0, 2176), Mark(32.0, 2240), Mark(40.0, 2304)),
    ]
    early = settle(incident(recovered=10.5, saved=2048), noticed[:2])
    assert (early.starts, early.lost, early.silence_s) == (0, 0, 1.5)
    whole = settle(early, noticed)
    assert (whole.starts, whole.lost, whole.at_risk, whole.earliest) == (1, 128, 128, 2048)
    assert (whole.recovered, whole.silence_s) == (32.0, 19.0)
    # What the fault before has cost is not counted again.
    after = settle(incident(time=33.0, recovered=40.0, saved=2048), noticed[6:])
    assert (after.starts, after.lost, after.silence_s) == (0, 0, 8.0)


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
    images = length(len(HELD), last=INTERVAL)  # the last one is no notice
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
