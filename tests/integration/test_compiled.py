"""Blocks that are compiled train like those that are not, with every engine that may have them."""

from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_engine import assert_trained_alike, on_ranks
from tests.support import engine_worker

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_ranks")]

COMPILED: list[dict[str, Any]] = [
    {"kind": "plain"},
    {"kind": "zero", "zero_stage": 1, "activation_checkpointing": (0,)},
    {"kind": "zero", "zero_stage": 2, "placement": {1: 2}},
    {"kind": "plain", "placement": {0: 2, 1: 2}, "activation_checkpointing": (0, 1)},
]


@pytest.fixture(scope="module")
def courses(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What happened to the engines on two ranks, with a cache of compiled code of their own."""
    cache: Path = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
        patch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
        engines = [each | {"compile": "blocks"} for each in COMPILED]
        told = on_ranks(engine_worker.course, 2, {"engines": engines})
    assert len(told) == len(COMPILED)
    assert any(cache.rglob("*.so"))  # or something else was compared
    return told


def test_losses_and_weights_are_those_of_blocks_as_they_are(courses):
    (alone,) = on_ranks(engine_worker.conformance, 1, {"variants": [{"kind": "plain"}]})
    assert_trained_alike(courses, alone)


def test_moved_state_trains_on_bit_for_bit(courses):
    for engine, result in zip(COMPILED, courses, strict=True):
        assert result["resumed"] == result["state"], engine
