"""Retention keeps what each clause says, never loses the newest valid one, and nothing in use."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pipelines.domains import SettingError
from tests.unit.trainer.checkpoint.handmade import upload
from tests.unit.trainer.checkpoint.stores import MemoryStore
from trainer.checkpoint import layout
from trainer.checkpoint.config import CheckpointConfig
from trainer.checkpoint.index import CheckpointIndex
from trainer.checkpoint.retention import orphans, reasons_to_keep
from trainer.config.reading import ConfigError, from_dict

MANY = settings(max_examples=500, deadline=None)
CHECKPOINTS = st.dictionaries(st.integers(0, 40), st.booleans(), max_size=14)
# Few values, so that there are ties.
SCORE = st.sampled_from([0.5, 1.0, 2.0, math.nan, math.inf])
SCORES = st.dictionaries(st.integers(0, 40), SCORE, max_size=14)
POLICIES = st.builds(
    CheckpointConfig,
    keep_last=st.integers(1, 4),
    keep_every_images=st.integers(0, 20),
    keep_best=st.integers(0, 3),
)


def kept(
    found: dict[int, bool],
    policy: CheckpointConfig,
    scores: dict[int, float],
    saved: int | None = None,
) -> set[int]:
    reasons = reasons_to_keep(found, policy, scores=scores, saved=saved)
    assert list(reasons) == sorted(found)
    return {images for images, why in reasons.items() if why}


@pytest.mark.slow
@MANY
@given(CHECKPOINTS, POLICIES, SCORES, st.integers(0, 40))
def test_exactly_what_the_clauses_say_is_kept(
    found: dict[int, bool], policy: CheckpointConfig, scores: dict[int, float], saved: int
) -> None:
    valid = sorted(images for images, good in found.items() if good)
    last = set(valid[-policy.keep_last :])
    every = {
        min(later)
        for multiple in range(policy.keep_every_images, 41, policy.keep_every_images or 41)
        if policy.keep_every_images and (later := [each for each in valid if each >= multiple])
    }
    measured = [images for images in valid if math.isfinite(scores.get(images, math.inf))]
    best = {
        images
        for images in measured
        if policy.keep_best
        > sum(
            scores[other] < scores[images] or (scores[other] == scores[images] and other > images)
            for other in measured
        )
    }
    damaged = {each for each, good in found.items() if not good and each > min(last, default=-1)}
    everything = last | every | best | damaged | ({saved} & found.keys())
    assert kept(found, policy, scores, saved) == everything
    assert not valid or valid[-1] in everything


@pytest.mark.slow
@MANY
@given(CHECKPOINTS, POLICIES, SCORES)
def test_applied_again_it_deletes_nothing_more(
    found: dict[int, bool], policy: CheckpointConfig, scores: dict[int, float]
) -> None:
    once = kept(found, policy, scores)
    left = {images: good for images, good in found.items() if images in once}
    assert kept(left, policy, scores) == once


@pytest.mark.slow
@MANY
@given(CHECKPOINTS, POLICIES, SCORES, st.integers(0, 2), st.integers(0, 2), st.integers(1, 3))
def test_asking_for_more_never_deletes_more(
    found: dict[int, bool],
    policy: CheckpointConfig,
    scores: dict[int, float],
    last: int,
    best: int,
    parts: int,
) -> None:
    every = policy.keep_every_images
    more = CheckpointConfig(
        keep_last=policy.keep_last + last,
        keep_every_images=every // parts if every % parts == 0 else every,
        keep_best=policy.keep_best + best,
    )
    assert kept(found, policy, scores) <= kept(found, more, scores)


@pytest.mark.slow
@MANY
@given(CHECKPOINTS, POLICIES, SCORES, st.integers(0, 40), SCORE)
def test_a_measurement_costs_at_most_the_best_one_whose_place_it_takes(
    found: dict[int, bool],
    policy: CheckpointConfig,
    scores: dict[int, float],
    images: int,
    score: float,
) -> None:
    before = {each: value for each, value in scores.items() if each != images}
    measured = [each for each in before if found.get(each) and math.isfinite(before[each])]
    lost = kept(found, policy, before) - kept(found, policy, {**before, images: score})
    assert len(lost) <= 1
    if len(measured) < policy.keep_best:
        assert not lost


@pytest.mark.parametrize("saved", [None, 3])
def test_nothing_goes_before_there_is_something_valid(saved: int | None) -> None:
    found = dict.fromkeys(range(9), False)
    assert kept(found, CheckpointConfig(keep_last=1), {}, saved) == set(found)


def test_reasons_are_for_people() -> None:
    found = dict.fromkeys((500_000, 1_000_000, 1_500_000, 2_500_000, 3_000_000), True)
    policy = CheckpointConfig(keep_last=2, keep_every_images=1_000_000, keep_best=1)
    scores = {500_000: math.nan, 1_000_000: 12.3149, 2_500_000: 12.5, 7_000_000: 1.0}
    assert reasons_to_keep({**found, 2_750_000: False}, policy, scores=scores, saved=2_500_000) == {
        500_000: (),
        1_000_000: ("every 1,000,000", "best (12.31)"),
        1_500_000: (),
        2_500_000: ("last", "every 1,000,000", "just saved"),
        2_750_000: ("damaged, to be looked at",),
        3_000_000: ("newest valid", "every 1,000,000"),
    }


def test_what_is_read_stays_until_it_was_read() -> None:
    found = dict.fromkeys((100, 200, 300), True)
    policy = CheckpointConfig(keep_last=1)
    reasons = reasons_to_keep(found, policy, scores={}, in_use=[100, 700])
    assert reasons == {100: ("being measured",), 200: (), 300: ("newest valid",)}


def test_damaged_ones_go_when_they_are_older_than_all_of_the_last() -> None:
    found = {10: False, 20: True, 30: False, 40: True, 50: False}
    assert kept(found, CheckpointConfig(keep_last=2), {}) == {20, 30, 40, 50}
    assert kept(found, CheckpointConfig(keep_last=1), {}) == {40, 50}


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
    found = orphans(keys, run="run", used={content(10, "used"), content(30, "used")}, committed=30)
    assert found == sorted(key for key, expected in keys.items() if expected)


@pytest.mark.parametrize(
    "settings",
    [{"keep_last": 0}, {"interval_images": -1}, {"keep_every_images": -1}, {"keep_best": -1}],
)
def test_settings_that_would_lose_the_run_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"checkpoint.{next(iter(settings))}=.* must be at least"):
        from_dict(CheckpointConfig, settings, path="checkpoint.")
    with pytest.raises(SettingError, match=f"{next(iter(settings))}=.* must be at least"):
        CheckpointConfig(**settings)


RUN = "run"
EVERY = 50
POLICY = CheckpointConfig(keep_last=2, keep_every_images=EVERY, keep_best=1)


class History(RuleBasedStateMachine):
    """A run that is saved, damaged, measured and pruned, for as long as hypothesis likes."""

    def __init__(self) -> None:
        super().__init__()
        self.store = MemoryStore()
        self.images = 0
        self.scores: dict[int, float] = {}
        self.saved: dict[int, dict[str, bytes]] = {}
        self.milestones: set[int] = set()

    def whole(self) -> list[int]:
        """What nothing was done to, oldest first."""
        there = self.store.objects.items()
        return sorted(images for images, each in self.saved.items() if each.items() <= there)

    def best(self, images: list[int]) -> int | None:
        """Of these the one of the lowest measured distance."""
        measured = [each for each in images if math.isfinite(self.scores.get(each, math.nan))]
        return min(measured, key=lambda each: (self.scores[each], -each), default=None)

    @initialize()
    def begins(self) -> None:
        self.is_saved(step=10)

    @rule(step=st.integers(1, 60))
    def is_saved(self, step: int) -> None:
        self.images += step
        manifest = upload(self.store, run=RUN, images=self.images, attempt="good")
        index = CheckpointIndex(self.store, run=RUN)
        assert index.commit(manifest) == manifest
        if self.images // EVERY > max(self.whole(), default=0) // EVERY:
            self.milestones.add(self.images)
        self.saved[self.images] = {
            key: self.store.objects[key]
            for key in (layout.manifest_key(RUN, self.images), manifest.objects[0].key)
        }
        before = self.whole()
        index.prune(manifest, policy=POLICY, scores=self.scores)
        after = self.whole()
        assert after[-POLICY.keep_last :] == before[-POLICY.keep_last :]
        assert self.best(before) == self.best(after)
        # Of what was given up nothing is left; only what somebody should look at.
        left = {layout.images_of(RUN, key) for key in self.store.objects}
        assert all(images >= after[-POLICY.keep_last :][0] for images in left - set(after))

    @rule(step=st.integers(1, 60))
    def dies_while_it_saves(self, step: int) -> None:
        self.images += step
        upload(self.store, run=RUN, images=self.images, attempt="dead")

    @precondition(lambda self: len(self.whole()) > 1)
    @rule(data=st.data(), how=st.sampled_from(["missing", "shorter"]))
    def is_damaged(self, data: st.DataObject, how: str) -> None:
        images = data.draw(st.sampled_from(self.whole()))
        key = data.draw(st.sampled_from(sorted(self.saved[images])))
        content = self.store.objects.pop(key)
        self.milestones.discard(images)
        if how == "shorter":
            self.store.objects[key] = content[:-1]

    @rule(data=st.data(), score=SCORE)
    def is_measured(self, data: st.DataObject, score: float) -> None:
        self.scores[data.draw(st.sampled_from(sorted(self.saved)))] = score

    @rule(policy=POLICIES.map(lambda policy: CheckpointConfig(**{**vars(policy), "keep_last": 1})))
    def is_pruned(self, policy: CheckpointConfig) -> None:
        before = self.whole()
        index = CheckpointIndex(self.store, run=RUN)
        plan = index.listing().deletion_plan(policy, scores=self.scores)
        index.clear(plan)
        assert self.whole() == [images for images in before if plan.reasons[images]]
        again = index.listing().deletion_plan(policy, scores=self.scores)
        assert not again.expired
        assert not again.manifests
        assert not again.content
        self.milestones &= set(self.whole())

    @invariant()
    def the_newest_whole_one_is_found(self) -> None:
        newest = CheckpointIndex(self.store, run=RUN).newest_valid()
        whole = self.whole()
        assert (newest.images if newest else None) == (whole[-1] if whole else None)

    @invariant()
    def milestones_stay(self) -> None:
        assert self.milestones <= set(self.whole())


TestHistory = pytest.mark.slow(History.TestCase)
TestHistory.settings = settings(max_examples=150, stateful_step_count=20, deadline=None)
