"""A loss that is no number: which updates count, when the run ends, and what is advised."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.placement import Placement
from pipelines.loading.loader import Cursor
from tests.support.engine_worker import OPTIM, tiny_model
from tests.support.loss_watch import watch
from tests.support.whole_step import EMA, IMAGES, MICRO_BATCH, some_images, whole_step
from trainer.engine.expert_shards import ExpertShards
from trainer.engine.optimizer import OptimConfig
from trainer.engine.plain import PlainEngine
from trainer.state import TrainState
from trainer.training.hooks import Diverged, UpdateReport
from trainer.training.loop import StopVote, train

BATCH = 10
CPU = torch.device("cpu")


def go(watched, losses, *, micro_batches=1):
    """Return the update at which the run was ended, or None."""
    for update, loss in enumerate(losses):
        for _ in range(micro_batches):
            watched.record(torch.tensor(loss))
        images = BATCH * (update + 1)
        report = UpdateReport(images_before=images - BATCH, images=images, waited_s=0.0)
        try:
            watched.after_update(report)
        except Diverged:
            return update + 1
    return None


@given(
    lost=st.lists(st.booleans(), min_size=1, max_size=60),
    interval=st.integers(1, 8),
    patience=st.integers(0, 6),
    value=st.sampled_from([math.nan, math.inf, -math.inf]),
)
def test_a_run_ends_when_no_loss_of_an_interval_was_finite(lost, interval, patience, value):
    def expected():
        for end in range(interval, len(lost) + 1, interval):
            row = 0
            while row < end and lost[end - 1 - row]:
                row += 1
            if row >= interval and row > patience:
                return end
        return None

    watched = watch(interval_images=interval * BATCH, patience_updates=patience)
    assert go(watched, [value if each else 1e22 for each in lost]) == expected()


def test_a_run_whose_last_losses_are_no_numbers_is_not_complete():
    nan = math.nan
    assert go(watch(total_images=3 * BATCH), [1.0, nan, nan]) == 3
    assert go(watch(total_images=3 * BATCH), [nan, nan, 1.0]) is None
    # One of them may be a stray batch.
    assert go(watch(total_images=3 * BATCH), [1.0, 1.0, nan]) is None


def test_a_state_with_such_losses_is_not_kept():
    watched = watch()
    kept = []
    for loss in (1.0, math.inf, math.inf, 2.0):
        go(watched, [loss], micro_batches=2)
        kept.append(not watched.is_diverging())
    assert kept == [True, True, False, True]


def test_the_advice_is_what_the_settings_leave_open():
    plain = str(watch(OptimConfig(learning_rate=3.0)).divergence_error("seen"))
    for part in ("optim.learning_rate=3", "set optim.clip_norm", "optim.warmup_images", "resume="):
        assert part in plain
    assert "fp32" not in plain
    assert "same command" not in plain
    careful = OptimConfig(clip_norm=0.5, warmup_images=64)
    text = str(watch(careful, precision="bf16").divergence_error("seen"))
    assert "lower optim.clip_norm=0.5" in text
    assert "engine.precision=fp32" in text
    assert "warmup" not in text


def test_updates_that_are_skipped_are_no_state_to_keep_but_a_stray_one_is():
    watched = watch()
    for is_applied, skipping in [(True, False), (False, False), (False, True), (True, False)]:
        watched.record(torch.tensor(1.0))
        watched.note_update(torch.tensor(is_applied))
        assert watched.is_skipping() == skipping


@pytest.mark.parametrize(("updates", "good"), [(16, 5), (32, 12), (11, 0)])
def test_a_run_whose_last_updates_did_not_come_through_is_not_complete(updates, good):
    """However its end lies to the updates at which the host asks."""
    engine = PlainEngine(
        tiny_model,
        arrange=lambda _model: None,
        shards=ExpertShards.of(Placement.of({}, scales=2), regather=False),
        optim=OPTIM,
        ema=EMA,
        grad_accum_steps=IMAGES // MICRO_BATCH,
        device=CPU,
    )
    passes = itertools.count()
    weight = next(engine._model.parameters())
    spoiled_from = good * IMAGES // MICRO_BATCH
    weight.register_hook(lambda each: each * math.inf if next(passes) >= spoiled_from else each)

    def batches(_start):
        for update in range(updates):
            yield some_images(CPU), Cursor(images=(update + 1) * IMAGES)

    state = TrainState()
    with pytest.raises(Diverged, match="the gradient was not finite in"):
        train(
            state,
            loader=SimpleNamespace(batches=batches, data_wait_s=0.0),
            step=whole_step(engine, CPU),
            hooks=[],
            stop=StopVote(lambda: False),
            total_images=updates * IMAGES,
            rank=0,
            advance=lambda _images: None,
        )
    assert state.images > good * IMAGES
