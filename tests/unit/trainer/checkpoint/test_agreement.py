"""Agreement: what one rank meets, all ranks raise, and none is left waiting."""

from __future__ import annotations

import pytest

from tests.unit.trainer.checkpoint.worlds import ThreadRanks, on_ranks
from trainer.checkpoint.agreement import Agreement
from trainer.checkpoint.errors import NewerManifest, RankFailed
from trainer.storage.errors import StoreError, StoreUnreachable


class _Private(StoreUnreachable):
    """An error that other ranks know by its base alone."""


def test_each_rank_keeps_its_own_result() -> None:
    outcomes = on_ranks(3, lambda rank, ranks: Agreement(ranks).run_on_all(lambda: rank))
    assert outcomes == [0, 1, 2]


def test_the_first_rank_collects_results_in_order() -> None:
    outcomes = on_ranks(3, lambda rank, ranks: Agreement(ranks).gather(lambda: bytes([rank])))
    assert outcomes == [[b"\0", b"\1", b"\2"], [], []]


def test_the_first_rank_decides_for_all() -> None:
    outcomes = on_ranks(3, lambda rank, ranks: Agreement(ranks).run_on_rank0(f"from {rank}".encode))
    assert outcomes == [b"from 0"] * 3


@pytest.mark.parametrize("kind", [StoreUnreachable, NewerManifest, _Private])
def test_an_error_of_one_rank_is_raised_by_all(kind: type[Exception]) -> None:
    def act(rank: int, ranks: ThreadRanks) -> int:
        def step() -> int:
            if rank >= 1:
                raise kind(f"the disk of rank {rank} is gone")
            return rank

        return Agreement(ranks).run_on_all(step)

    outcomes = on_ranks(3, act)
    known = StoreUnreachable if kind is _Private else kind
    assert [type(outcome) for outcome in outcomes] == [known] * 3
    assert {str(outcome) for outcome in outcomes} == {"the disk of rank 1 is gone"}


def test_a_foreign_error_names_its_rank_and_keeps_its_cause_where_it_happened() -> None:
    def act(rank: int, ranks: ThreadRanks) -> None:
        def step() -> None:
            if rank == 1:
                raise ZeroDivisionError("by zero")

        return Agreement(ranks).run_on_all(step)

    here, there = on_ranks(2, act)
    for outcome in (here, there):
        assert isinstance(outcome, RankFailed)
        assert str(outcome) == "Rank 1 failed with ZeroDivisionError: by zero"
    assert isinstance(here, BaseException)
    assert isinstance(there, BaseException)
    assert here.__cause__ is None
    assert isinstance(there.__cause__, ZeroDivisionError)


def test_an_error_of_the_deciding_rank_is_raised_by_all() -> None:
    def refuse() -> bytes:
        raise StoreError("full")

    outcomes = on_ranks(2, lambda _, ranks: Agreement(ranks).run_on_rank0(refuse))
    assert [(type(outcome), str(outcome)) for outcome in outcomes] == [(StoreError, "full")] * 2


@pytest.mark.parametrize("world", [2, 8])
def test_outcomes_take_as_many_bytes_with_many_ranks_as_with_few(world: int) -> None:
    def act(rank: int, ranks: ThreadRanks) -> list[int]:
        agreement = Agreement(ranks)
        agreement.run_on_all(lambda: b"x" * 10_000)
        agreement.run_on_rank0(lambda: b"y" * 99)
        agreement.gather(lambda: b"z" * 1000)
        return ranks.received

    first, *others = on_ranks(world, act)
    assert first == [8, 100, 8, 1000 * world]
    assert others == [[8, 100, 8, 0]] * (world - 1)
