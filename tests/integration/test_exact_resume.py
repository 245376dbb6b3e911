"""A run that is killed and resumed ends with the same bits as one that nothing disturbed.

Real ranks on gloo, the worker's own page, DeepSpeed ZeRO in fp32, shards decoded by DALI, metrics
in MLflow, checkpoints uploaded while training goes on; and SIGKILL for all ranks at once.
"""

import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.ingest.digits import ensure_digits
from tests.support.worker_runs import BATCH, TINY, Hold, Seen, State, points, trained
from trainer.checkpoint.content import load_weights
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.reader import CheckpointReader
from trainer.storage.open import open_store
from trainer.storage.store import StoreConfig

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_ranks")]

# An epoch has 1438 images, so 15 updates, and the last but one checkpoint, after 18, is in the
# second. No curve has a point there: the values since update 16 must come from the checkpoint.
UPDATES = 25
SAVE_EVERY, LOG_EVERY = 6, 4
FIRST, SECOND, THIRD = (number * SAVE_EVERY * BATCH for number in (1, 2, 3))

SHARDED = "{0:2,1:2}"
KEEPING = f"{SHARDED} engine.regather_tokens=false"
ENGINES = [*product((1, 2, 3), ("replicated", SHARDED)), (2, KEEPING)]


@dataclass(frozen=True)
class Run:
    """A run of one engine on two ranks in a home of its own."""

    home: Path
    settings: tuple[str, ...]

    def train(self, updates: int, **ending: Any) -> Seen:
        return trained(
            *TINY,
            f"home={self.home}",
            "cluster.workers=2",
            f"checkpoint.interval_images={SAVE_EVERY * BATCH}",
            f"runtime.log_interval_images={LOG_EVERY * BATCH}",
            *self.settings,
            updates=updates,
            **ending,
        )

    def committed(self, images: int) -> bool:
        return (self._checkpoint(images) / "MANIFEST.json").exists()

    def objects(self, images: int) -> set[str]:
        return {path.name for path in self._checkpoint(images).glob("*/rank-*.safetensors")}

    def saved(self, images: int) -> tuple[State, Manifest]:
        """The content of a checkpoint, and what else it tells."""
        store = open_store(f"{self.home}/store/runs", StoreConfig())
        manifest = CheckpointReader(store, run="digits").manifest(images)
        assert manifest is not None
        state = {
            f"{kind}/{name}": tensor.flatten().numpy()
            for kind in manifest.kinds
            for name, tensor in load_weights(store, manifest, kind).items()
        }
        return state, manifest

    def _checkpoint(self, images: int) -> Path:
        return self.home / f"store/runs/digits/checkpoints/{images:012d}"


@pytest.fixture(scope="module")
def begin(tmp_path_factory, empty_tracker) -> Callable[[int, str], Run]:
    """Make a run that has not begun."""
    data = tmp_path_factory.mktemp("data") / "digits"
    ensure_digits(str(data))

    def make(stage: int, placement: str) -> Run:
        home = tmp_path_factory.mktemp("home")
        shutil.copy(empty_tracker, home)
        engine = (f"engine.zero_stage={stage}", *f"engine.placement={placement}".split())
        return Run(home, (f"data.prefix={data}", "train.ema.decays=[0.99]", *engine))

    return make


@pytest.fixture(scope="module")
def undisturbed(begin) -> Callable[[int, str], tuple[Run, Seen]]:
    """Run an engine through, once for all tests that ask."""
    done: dict[tuple[int, str], tuple[Run, Seen]] = {}

    def get(stage: int, placement: str) -> tuple[Run, Seen]:
        if (stage, placement) not in done:
            run = begin(stage, placement)
            done[stage, placement] = run, run.train(UPDATES)
        return done[stage, placement]

    return get


def curves(run: Run) -> dict[tuple[str, int], float]:
    """Points of what must not depend on how a run went: all but its pace and memory."""
    varies = ("speed/", "system/")
    return {at: value for at, value in points(run.home).items() if not at[0].startswith(varies)}


def assert_same_state(one: State, other: State) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not np.array_equal(one[name], other[name])] == []


def assert_same_run(run: Run, seen: Seen, undisturbed: tuple[Run, Seen]) -> None:
    whole, whole_seen = undisturbed
    assert (seen.images, whole_seen.images) == (UPDATES * BATCH, UPDATES * BATCH)
    assert_same_state(seen.left, whole_seen.left)
    (state, manifest), (wanted, whole_manifest) = (r.saved(UPDATES * BATCH) for r in (run, whole))
    assert_same_state(state, wanted)
    assert_same_state(state, seen.left)
    # Counters, and the values recorded since the last point. Which points are still on their way to
    # MLflow is a matter of its speed.
    counters, wanted_counters = (
        {**each.train_state, "unsent_points": None} for each in (manifest, whole_manifest)
    )
    assert counters == wanted_counters
    assert manifest.train_state["updates"] == UPDATES
    assert "loss/total" in manifest.train_state["metrics"]
    drawn = curves(run)
    assert drawn == curves(whole)
    for name in ("loss/total", "loss/scale_1", "optim/gradient_norm", "training_data/scale_0_std"):
        steps = [images for key, images in drawn if key == name]
        assert sorted(steps) == list(range(LOG_EVERY * BATCH, UPDATES * BATCH, LOG_EVERY * BATCH))


@pytest.mark.parametrize(("stage", "placement"), ENGINES)
def test_a_killed_run_goes_on_bit_for_bit(begin, undisturbed, stage, placement):
    run = begin(stage, placement)
    run.train(
        19,
        # Training goes on before the saved state is written.
        hold=Hold(key=f"{THIRD:012d}", released=True),
        kill_when=lambda: run.committed(THIRD),
    )
    assert run.saved(THIRD)[1].train_state["metrics"] != {}
    again = run.train(UPDATES - 18)
    assert again.resumed == THIRD
    assert_same_state(again.loaded, run.saved(THIRD)[0])
    assert_same_run(run, again, undisturbed(stage, placement))


def test_a_run_branches_off_another(begin, undisturbed):
    """With ZeRO-2 no rank knows all names of the other run's checkpoint."""
    whole, _ = undisturbed(2, "replicated")
    source = f"{whole.home}/store/runs/digits/checkpoints/{THIRD:012d}"
    plain = begin(2, "replicated")
    changes = (f"resume={source}", "optim.learning_rate=5e-4")
    run = Run(plain.home, (*plain.settings, *changes))
    with pytest.raises(ValueError, match=r"optim\.learning_rate: .* -> 0\.0005"):
        run.train(1)
    branch = Run(run.home, (*run.settings, "resume_changed=true"))
    seen = branch.train(2)
    assert seen.resumed == THIRD
    assert_same_state(seen.loaded, whole.saved(THIRD)[0])
    # Stopped off the interval, it has saved its last state as its own.
    assert branch.saved(seen.images)[1].train_state["updates"] == 20


def test_it_does_not_matter_when_a_run_is_killed_nor_how_often_nor_where_its_average_is(
    begin, undisturbed
):
    run = begin(2, SHARDED)
    # Before any save; while the first rank's part of one is written and the second's is not; while
    # all is written and not committed; right after a commit; and between two saves.
    run.train(3, kill_when=lambda: True)
    seen = run.train(
        8,
        hold=Hold(key=f"{FIRST:012d}", rank=1),
        kill_when=lambda: run.objects(FIRST) == {"rank-00000.safetensors"},
    )
    assert seen.resumed == 0
    seen = run.train(
        13,
        hold=Hold(key=f"{SECOND:012d}/MANIFEST"),
        kill_when=lambda: len(run.objects(SECOND)) == 2,
    )
    assert seen.resumed == 0
    assert not run.committed(SECOND)
    at_home = run.settings
    run = Run(run.home, (*at_home, "train.ema.device=host"))
    seen = run.train(6, kill_when=lambda: run.committed(SECOND))
    assert seen.resumed == FIRST
    seen = run.train(8, kill_when=lambda: run.committed(THIRD))
    assert seen.resumed == SECOND
    run = Run(run.home, at_home)
    seen = run.train(UPDATES - 18)
    assert seen.resumed == THIRD
    assert_same_run(run, seen, undisturbed(2, SHARDED))


def test_what_a_newer_version_goes_on_with_stays_one_run_of_mlflow(begin):
    """It knows a scientific setting that the first one does not, and would hash other science."""
    run = begin(2, "replicated")
    run.train(SAVE_EVERY, unknown="model.attention")
    for images in (FIRST, SECOND):
        assert run.train(SAVE_EVERY).resumed == images
    assert [
        "attention" in run.saved(images)[1].science["model"] for images in (FIRST, SECOND, THIRD)
    ] == [False, True, True]
    with sqlite3.connect(run.home / "mlflow.db") as database:
        ((_, status),) = database.execute("SELECT run_uuid, status FROM runs").fetchall()
    assert status == "KILLED"  # as each launch was stopped
    losses = {images for name, images in points(run.home) if name == "loss/total"}
    step = LOG_EVERY * BATCH
    assert losses == set(range(step, THIRD + 1, step))
