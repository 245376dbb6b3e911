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
IN_BF16: dict[str, Any] = {"kind": "zero", "zero_stage": 1, "precision": "bf16"}


def courses(engines: list[dict[str, Any]], *, ranks: int, backend: str) -> list[dict[str, Any]]:
    """What happened to engines, whose blocks are compiled unless they say otherwise."""
    compiled = [{"compile": "blocks"} | each for each in engines]
    told = on_ranks(engine_worker.course, ranks, {"engines": compiled, "backend": backend})
    assert len(told) == len(engines)
    return told


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    (told,) = on_ranks(engine_worker.conformance, 1, {"variants": [{"kind": "plain"}]})
    return told


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One process whose blocks are C++, in a cache of its own."""
    cache: Path = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
        patch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
        told = courses(COMPILED[:1], ranks=1, backend="inductor")
    assert any(cache.rglob("*.so"))  # or something else was compared
    return told


@pytest.fixture(scope="module")
def traced() -> list[dict[str, Any]]:
    """Two ranks whose blocks are graphs of forward and backward pass, without a C++ compiler.

    The last two are in bf16, and of the very last the blocks are as they are.
    """
    return courses([*COMPILED, IN_BF16, IN_BF16 | {"compile": "off"}], ranks=2, backend="aot_eager")


def test_losses_and_weights_are_those_of_blocks_as_they_are(alone, generated, traced):
    assert_trained_alike([*generated, *traced[: len(COMPILED)]], alone)


def test_in_bf16_they_are_those_of_blocks_as_they_are_too(traced):
    compiled, plain = traced[-2:]
    assert_trained_alike([compiled], plain)


def test_moved_state_trains_on_bit_for_bit(generated, traced):
    for result in (*generated, *traced):
        assert result["resumed"] == result["state"]


def test_a_nan_on_one_rank_is_skipped_by_all(traced):
    for result in traced:
        assert result["applied"] == [False, False]
        assert result["unmoved"]
