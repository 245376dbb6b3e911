"""Why workers are asked to leave, and what is known of workers that are lost."""

from concurrent.futures import wait
from dataclasses import replace

import pytest

from cluster import ray_leaving, ray_loss
from cluster.assignment import Node, WorkerGroupSpec
from cluster.failure import Failure
from cluster.ray_leaving import End, Leave, LeaveWatch, format_ranks, leave_of_draining, with_own
from cluster.ray_loss import Loss
from cluster.ray_mailbox import Broken, Seat, Started
from cluster.ray_monitor import Standing, seating


def seat(node: str) -> Seat:
    return Seat(node=node, address=f"10.0.0.{node}", host=f"host{node}", pid=1)


SEATS = tuple(seat(node) for node in "112234")


@pytest.mark.parametrize(
    ("going", "reason", "grace_s"),
    [
        ({"9": 10.0}, None, None),
        ({"2": 30.4}, "10.0.0.2 (ranks 2 to 3) is taken away in 30 s", 27.4),
        ({"3": None}, "10.0.0.3 (rank 4) is taken away", None),
        (
            {"1": 50.0, "4": 20.0, "9": 1.0},
            "10.0.0.1, 10.0.0.4 (ranks 0, 1, 5) is taken away in 20 s",
            17.0,
        ),
        # By a clock that is behind that of the node's owner.
        ({"2": -5.0}, "10.0.0.2 (ranks 2 to 3) is taken away", None),
        ({"1": 0.0, "4": 20.0}, "10.0.0.1, 10.0.0.4 (ranks 0, 1, 5) is taken away in 20 s", 17.0),
    ],
)
def test_workers_leave_before_the_first_of_their_nodes_goes(
    going: dict[str, float | None], reason: str | None, grace_s: float | None
) -> None:
    leave = leave_of_draining(SEATS, going)
    if reason is None:
        assert leave is None
        return
    assert leave is not None
    assert (leave.kind, leave.reason) == ("preemption", reason)
    assert leave.grace_s == (None if grace_s is None else pytest.approx(grace_s))


class Clock:
    """A time that a test sets."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


def test_a_run_ends_with_the_drivers_own_node_whether_or_not_a_rank_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, looks = Clock(), list[float]()
    going: dict[str, float | None] = {}

    def look() -> dict[str, float | None]:
        looks.append(clock.now_s)
        return dict(going)

    monkeypatch.setattr(ray_leaving, "time", clock)
    monkeypatch.setattr(ray_leaving, "draining_nodes", look)
    watch = LeaveWatch([], home="9", grow="never")
    assert watch.look_home() is None
    going["9"] = 150.0
    clock.now_s += 0.1
    assert watch.look_home() is None  # it does not ask as often as it is asked
    clock.now_s += 2.0
    told = End(reason="the node of this launch is taken away in 150 s", grace_s=147.0)
    assert watch.look_home() == told
    clock.now_s += 1.0
    later = watch.look_home()
    assert later is not None
    assert later.grace_s == pytest.approx(146.0)  # by a look of a second ago
    assert len(looks) == 2
    clock.now_s += 2.0
    going["9"] = None
    assert watch.look_home() == End(reason="the node of this launch is taken away")
    clock.now_s += 2.0
    going.clear()
    going["2"] = 30.0
    assert watch.look_home() is None
    leave = watch.look(SEATS, saves=0)
    assert leave is not None
    assert leave.reason == "10.0.0.2 (ranks 2 to 3) is taken away in 30 s"


def test_room_counts_what_the_workers_themselves_hold() -> None:
    spec = WorkerGroupSpec(workers=6, group_size=1, cpus=2, gpus=1)
    free = [Node(id="1", address="a", cpus=1, gpus=0), Node(id="9", address="b", cpus=4, gpus=2)]
    assert [
        (node.cpus, node.gpus) for node in with_own(free, [seat.node for seat in SEATS], spec)
    ] == [(5, 2), (4, 2)]


def test_who_runs_where_is_told_by_node() -> None:
    assert seating(Started(3, SEATS)) == [
        "attempt 3: 6 workers on 4 nodes",
        "attempt 3: ranks 0 to 1 on 10.0.0.1 (host1)",
        "attempt 3: ranks 2 to 3 on 10.0.0.2 (host2)",
        "attempt 3: rank 4 on 10.0.0.3 (host3)",
        "attempt 3: rank 5 on 10.0.0.4 (host4)",
    ]
    assert seating(Started(0, SEATS[:2])) == ["attempt 0: 2 workers on 10.0.0.1 (host1)"]
    assert format_ranks([0, 2]) == "ranks 0, 2"


def failure(rank: int, text: str, *, images: int | None = None) -> Failure:
    return Failure(rank=rank, attempt=2, kind="raised", text=text, images=images)


def test_a_failure_that_workers_told_is_not_taken_from_ray_as_well() -> None:
    broken = Broken("workers", (failure(0, "as Ray has it"), failure(1, "KeyError: 'x'")), "")
    loss = Loss(broken, SEATS)
    failures = loss.failures([failure(0, "Connection closed by peer")], left=[])
    assert [one.text for one in failures] == ["Connection closed by peer", "KeyError: 'x'"]
    assert loss.kind == "crash"
    assert (
        loss.describe(failures) == "worker 1 on 10.0.0.1 failed with KeyError: 'x', 1 more with it"
    )
    assert str(loss.error(failures, reason="")) == "Worker 1 failed with KeyError: 'x'"
    assert not loss.is_known(failures, left=[])  # four more may have something to say
    assert loss.is_known(failures, left=[2, 3, 4, 5])


def test_nobody_waits_for_words_of_workers_that_went_with_their_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_loss, "answering", lambda nodes: nodes - {"3", "4"})
    loss = Loss(Broken("workers", (failure(0, "Connection closed by peer"),), ""), SEATS)
    told = [failure(rank, "Connection closed by peer") for rank in range(4)]
    wait([loss._answers])
    assert not loss.is_known(told[:3], left=[])  # rank 3 has a node that answers
    assert loss.is_known(told, left=[])
    assert loss.kind == "node"


def test_workers_that_left_as_asked_did_not_fail() -> None:
    leave = Leave(kind="resize", reason="there is room for 8 of them")
    told = tuple(failure(rank, "RuntimeError: asked to leave") for rank in range(6))
    loss = Loss(Broken("workers", told, ""), SEATS, leave)
    assert loss.failures([], left=range(6)) == []
    assert loss.kind == "resize"
    assert loss.describe([]) == "all workers left, since there is room for 8 of them"


def test_a_start_that_failed_is_not_explained_by_the_attempt_before() -> None:
    loss = Loss(Broken("start", (), "no room in time"), SEATS)
    assert loss.failures([failure(0, "long ago")], left=[]) == []
    assert (loss.kind, loss.describe([])) == ("start", "no room in time")


def test_where_logs_are_is_told_with_the_node() -> None:
    seat = replace(SEATS[1], output=("/tmp/ray/s/logs/w-7.out", "/tmp/ray/s/logs/w-7.err"))
    lost = Failure(rank=1, attempt=-1, kind="died", text="was ended by SIGKILL.")
    loss = Loss(Broken("workers", (lost,), ""), [SEATS[0], seat])
    assert (loss.died, loss.first_of_nodes()) == ((1,), [1])
    assert str(loss.error([lost], reason="")) == (
        "Worker 1 was ended by SIGKILL. Ray's logs of it are in /tmp/ray/s/logs on 10.0.0.1: "
        "w-7.out and w-7.err, and raylet.out."
    )


def test_of_each_node_one_that_died_is_named() -> None:
    lost = tuple(Failure(rank=rank, attempt=-1, kind="died", text="") for rank in (5, 3, 2, 0, 9))
    loss = Loss(Broken("workers", lost, ""), SEATS)
    assert loss.died == (5, 3, 2, 0)
    assert loss.first_of_nodes() == [0, 2, 5]


def test_a_run_is_as_far_as_any_of_its_workers_tells() -> None:
    standing = Standing()
    standing.take(Started(2, SEATS))
    assert standing.farthest([]) is None
    assert standing.farthest([failure(0, "", images=70), failure(1, "", images=80)]) == 80
    assert standing.describe(80) == "80 images were trained, nothing is saved"
