"""Agreement: what one rank meets, all ranks raise, and none is left waiting."""

from __future__ import annotations

from tests.unit.trainer.checkpoint.worlds import on_ranks
from trainer.checkpoint.agreement import Agreement, Gather
from trainer.checkpoint.errors import RankFailed, StoreError, StoreUnreachable


def test_results_reach_every_rank_in_order() -> None:
    outcomes = on_ranks(
        3, lambda rank, gather: Agreement(rank=rank, gather=gather).each(lambda: rank)
    )
    assert outcomes == [[0, 1, 2]] * 3


def test_the_first_rank_decides_for_all() -> None:
    outcomes = on_ranks(
        3, lambda rank, gather: Agreement(rank=rank, gather=gather).first(lambda: f"from {rank}")
    )
    assert outcomes == ["from 0"] * 3


def test_an_error_of_one_rank_is_raised_by_all() -> None:
    def act(rank: int, gather: Gather) -> list[int]:
        def step() -> int:
            if rank >= 1:
                raise StoreUnreachable(f"the disk of rank {rank} is gone")
            return rank

        return Agreement(rank=rank, gather=gather).each(step)

    outcomes = on_ranks(3, act)
    assert [type(outcome) for outcome in outcomes] == [StoreUnreachable] * 3
    assert {str(outcome) for outcome in outcomes} == {"the disk of rank 1 is gone"}


def test_a_foreign_error_names_its_rank_and_keeps_its_cause_where_it_happened() -> None:
    def act(rank: int, gather: Gather) -> list[None]:
        def step() -> None:
            if rank == 1:
                raise ZeroDivisionError("by zero")

        return Agreement(rank=rank, gather=gather).each(step)

    here, there = on_ranks(2, act)
    for outcome in (here, there):
        assert isinstance(outcome, RankFailed)
        assert str(outcome) == "Rank 1 failed with ZeroDivisionError: by zero"
    assert isinstance(here, BaseException)
    assert isinstance(there, BaseException)
    assert here.__cause__ is None
    assert isinstance(there.__cause__, ZeroDivisionError)


def test_an_error_of_the_deciding_rank_is_raised_by_all() -> None:
    def refuse() -> None:
        raise StoreError("full")

    outcomes = on_ranks(2, lambda rank, gather: Agreement(rank=rank, gather=gather).first(refuse))
    assert [(type(outcome), str(outcome)) for outcome in outcomes] == [(StoreError, "full")] * 2
