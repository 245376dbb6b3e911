"""A store with a run to be measured."""

from pathlib import Path

import jaxtyping
import pytest

from tests.unit.trainer.evaluation.small_run import write_store


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its run is `small`, of `small_run`."""
    place: Path = tmp_path_factory.mktemp("store")
    write_store(place)
    return place


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the shape types of `models` unchecked: a tracer cannot trace the checks."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
