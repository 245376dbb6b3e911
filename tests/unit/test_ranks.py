"""Many ranks, played by one process: what they send grows as it should, and none waits for another.

The counts are those of `python -m benchmarks.ranks`, of the code that a run has.
"""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks.experts.variant import Variant
from benchmarks.ranks import balance
from benchmarks.ranks.__main__ import main
from benchmarks.ranks.checkpoint import measure_deletes
from benchmarks.ranks.cluster import measure_mailbox, measure_probing

RANKS = (1, 8, 16, 32)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, dict[str, Any]]]:
    """The rows of the command, by what they are of and by ranks."""
    file: Path = tmp_path_factory.mktemp("ranks") / "out.json"
    ranks = ",".join(map(str, RANKS))
    assert main(["--device", "cpu", "--ranks", ranks, "--output", str(file)]) == 0
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    for row in json.loads(file.read_text())["rows"]:
        rows.setdefault(row["what"], {})[row["ranks"]] = row
    assert all(tuple(found) == RANKS for found in rows.values())
    return rows


def per_rank(rows: dict[int, dict[str, Any]], column: str) -> set[float]:
    """What each further rank adds to a column, from one number of ranks to the next."""
    return {
        (rows[more][column] - rows[less][column]) / (more - less)
        for less, more in pairwise(RANKS[1:])
    }


@pytest.mark.slow
def test_what_ranks_send_each_other_grows_with_their_number_and_no_faster(
    table: dict[str, dict[int, dict[str, Any]]],
) -> None:
    assert per_rank(table["vote"], "messages") == {2}
    for what, most, to_first in (("save", 32, 17), ("restore", 10, 5)):
        assert table[what][1]["messages"] == table[what][1]["KiB"] == 0
        (messages,) = per_rank(table[what], "messages")
        assert messages <= most
        (told,) = per_rank(table[what], "to the first")
        assert told <= to_first
        # Each reads and writes its own object, and asks the store for nothing else.
        assert per_rank(table[what], "requests") == {1}


@pytest.mark.slow
def test_a_rank_is_told_one_plan_or_one_manifest_and_not_what_others_hold(
    table: dict[str, dict[int, dict[str, Any]]],
) -> None:
    for what in ("save", "restore"):
        for ranks in RANKS[1:]:
            row = table[what][ranks]
            told = (row["KiB"] - row["its KiB"]) / (ranks - 1)
            assert told <= table["manifest"][ranks]["KiB"] + 1


def test_one_worker_of_a_node_asks_and_nodes_are_asked_once() -> None:
    for ranks, nodes in ((1, 1), (8, 1), (9, 2), (1000, 125), (4096, 512)):
        asked = measure_mailbox(ranks, ranks_per_node=8)
        assert asked["messages"] == 2 * 12 * nodes
    assert measure_probing(200, ranks_per_node=8)["messages"] == 25


@pytest.mark.parametrize(("objects", "requests"), [(1, 1), (1000, 1), (1001, 2), (4096, 5)])
def test_objects_are_deleted_a_thousand_a_request(objects: int, requests: int) -> None:
    assert measure_deletes(objects)["requests"] == requests


@pytest.mark.slow
@pytest.mark.parametrize("stage_choice", ["stratified", "one_per_step"])
@pytest.mark.parametrize(
    ("placement", "passes"), [("replicated", 1), ("replicated", 2), ("{2:8,1:4}", 1)]
)
def test_no_rank_is_busier_than_others(placement: str, passes: int, stage_choice: str) -> None:
    job = Variant(scales=3, zero_stage=1, placement=placement, grad_accum_steps=passes).job(
        model="s_2", ranks=32, images=6
    )
    job = replace(job, flow=replace(job.flow, stage_choice=stage_choice))
    row = balance.measure(job, updates=2)
    assert row["balance"] == pytest.approx(1, abs=1e-9)
    # It would not be so by itself.
    assert isinstance(row["by chance"], float)
    assert row["by chance"] < 0.97


def test_ranks_of_a_group_wait_for_the_one_that_carries_most() -> None:
    job = Variant(scales=3, zero_stage=1, placement="{2:2}").job(model="s_2", ranks=4, images=3)
    own = [(3.0, 2.0, 1.0), (3.0, 1.0, 1.0), (2.0, 3.0, 0.0), (3.0, 3.0, 3.0)]
    most = balance.most_of_groups(job, own)
    assert most == [(3.0, 2.0, 1.0)] * 2 + [(3.0, 3.0, 3.0)] * 2


@pytest.mark.parametrize("ranks", [8, 1000])
def test_what_is_left_over_of_weights_leaves_no_rank_with_much_less(ranks: int) -> None:
    job = Variant(scales=3, zero_stage=3).job(model="s_2", ranks=ranks, images=3)
    assert 0.95 < balance.state_balance(job) <= 1
