"""Two processes that save one run at once: each checkpoint is of one of them, and whole."""

from __future__ import annotations

import copy
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.remote_store import RemoteStore, in_forks, load_state, save_state
from tests.unit.trainer.checkpoint.worlds import RUN, random_state, same_bits
from trainer.checkpoint import layout
from trainer.checkpoint.reader import CheckpointReader
from trainer.storage.store import Store

pytestmark = pytest.mark.slow

OLD, NEW, NEXT = 10, 20, 30


class Racers:
    """Two processes that save checkpoints of one run at the same moment.

    Attributes:
        outcomes: What each of them heard.
    """

    def __init__(self, store: Store, folder: Path, *saves: dict[str, Any]) -> None:
        begin = time.time() + 0.5

        def race(number: int) -> None:
            # A fork must not share the connections of another process.
            own = copy.copy(saves[number])
            time.sleep(max(0.0, begin - time.time()))
            (outcome,) = save_state(own.pop("store"), random_state(number), **own)
            (folder / str(number)).write_text(f"{type(outcome).__name__}: {outcome}")

        codes = in_forks(*(partial(race, number) for number in range(len(saves))))
        assert codes == [0] * len(saves)
        self.outcomes = [(folder / str(number)).read_text() for number in range(len(saves))]


@pytest.mark.parametrize("attempt", range(3))
def test_two_processes_that_save_the_same_images(
    remote: RemoteStore, tmp_path: Path, attempt: int
) -> None:
    store = remote.store
    save_state(store, random_state(OLD), images=OLD)
    saves = [{"store": remote.direct(), "images": NEW, "keep_last": 1} for _ in range(2)]
    race = Racers(store, tmp_path, *saves)
    assert race.outcomes == [f"str: {store.uri(layout.checkpoint_key(RUN, NEW))}"] * 2
    found = load_state(store)
    assert found
    assert found[0] == NEW
    assert any(same_bits(found[1], random_state(number)) for number in range(2))
    save_state(store, random_state(NEXT), images=NEXT, keep_last=1)
    assert len(store.list("")) == 2  # what the loser wrote is gone


@pytest.mark.parametrize("attempt", range(3))
def test_two_processes_that_save_different_images(
    remote: RemoteStore, tmp_path: Path, attempt: int
) -> None:
    """The one behind may find its objects taken for remains: it hears of it, no harm is done."""
    store = remote.store
    save_state(store, random_state(OLD), images=OLD)
    saves = [{"store": remote.direct(), "images": images, "keep_last": 1} for images in (NEW, NEXT)]
    behind, ahead = Racers(store, tmp_path, *saves).outcomes
    assert ahead.startswith("str: ")
    assert behind.startswith("str: ") or "see that only one process trains run=" in behind
    found = load_state(store)
    assert found
    assert found[0] == NEXT
    assert same_bits(found[1], random_state(1))


@pytest.mark.parametrize("attempt", range(3))
def test_two_launches_of_different_configurations(
    remote: RemoteStore, tmp_path: Path, attempt: int
) -> None:
    store = remote.store
    saves = [
        {
            "store": remote.direct(),
            "images": NEW,
            "science": {"science": {"seed": seed}, "config_fingerprint": str(seed)},
        }
        for seed in range(2)
    ]
    outcomes = Racers(store, tmp_path, *saves).outcomes
    done = [number for number, outcome in enumerate(outcomes) if outcome.startswith("str: ")]
    for number, outcome in enumerate(outcomes):
        if number not in done:
            assert outcome.startswith("CheckpointConflict: ")
            assert store.uri(layout.checkpoint_key(RUN, NEW)) in outcome
            assert "choose another run name" in outcome
    manifest = CheckpointReader(store, run=RUN).newest_valid()
    found = load_state(store)
    assert manifest
    assert found
    # Whoever stands there, weights and configuration are of one and the same launch.
    assert int(manifest.config_fingerprint) in done
    assert same_bits(found[1], random_state(int(manifest.config_fingerprint)))
