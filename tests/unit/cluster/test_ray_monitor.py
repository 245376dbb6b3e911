"""What a driver does with what it is told, without Ray: events in, permissions out."""

import pickle
import threading
import time
from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError, RayTaskError
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import NoopDecision
from ray.train.v2.api.exceptions import ControllerError

from cluster import ray_controller, ray_loss, ray_room
from cluster.assignment import Node, WorkerGroupSpec
from cluster.contract import Caller, ClusterConfig, Line, LostWorkers
from cluster.failure import Failure, WorkerFailed, WorkerRefused
from cluster.process_group import WorkersAbsent
from cluster.ray_controller import Group
from cluster.ray_leaving import End, Leave, LeaveWatch
from cluster.ray_mailbox import (
    Advanced,
    Begun,
    Broken,
    Event,
    Kept,
    Left,
    Readmitted,
    Seat,
    Started,
)
from cluster.ray_monitor import RunMonitor
from cluster.ray_output import OutputLog
from cluster.ray_room import RoomPolicy
from cluster.ray_worker import NotJoined


class Way:
    """The mailbox's driver side, in memory."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.allowed: list[tuple[int, int | None]] = []
        self.asked: list[int] = []
        self.stopped: list[float | None] = []
        self.avoided: frozenset[str] = frozenset()

    def inbox(self) -> "Way":
        return self

    def fetch(self) -> list[Event]:
        events, self.events = self.events, []
        return events

    def allow(self, workers: int, *, most: int | None, avoided: frozenset[str]) -> None:
        self.allowed.append((workers, most))
        self.avoided = avoided

    def ask_to_leave(self, attempt: int, grace_s: float | None) -> None:
        self.asked.append(attempt)

    def ask_to_stop(self, grace_s: float | None) -> None:
        self.stopped.append(grace_s)


class Watch(LeaveWatch):
    """Gives the reason to leave that a test wants."""

    def __init__(self) -> None:
        super().__init__([], home="home", grow="now")
        self.reason: Leave | None = None
        self.end: End | None = None

    def look_home(self) -> End | None:
        return self.end

    def look(self, seats: object, *, saves: int) -> Leave | None:
        return self.reason


class Heard:
    """What workers wrote, and which of them were lost."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.lost: list[LostWorkers] = []

    def take(self, line: Line) -> None:
        self.lines.append(line)

    def lose(self, lost: LostWorkers) -> None:
        self.lost.append(lost)


class Driver:
    """A monitor whose turns a test takes."""

    def __init__(self, **settings: float) -> None:
        self.line, self.watch, self.told = Way(), Watch(), list[str]()
        self.heard = Heard()
        caller = Caller(
            on_message=print,
            stop=threading.Event(),
            report=self.told.append,
            listener=self.heard,
        )
        output = OutputLog(self.heard.take, here="here", names_nodes=True)
        config = ClusterConfig(workers=4, min_workers=2, **settings)
        self.monitor = RunMonitor(config, self.line, None, caller, watch=self.watch, output=output)  # type: ignore[arg-type]

    def hear(self, *events: Event) -> None:
        """One turn, and those in which a failure's cause is found out."""
        self.line.events += events
        self.monitor._handle(self.line.fetch())
        before = len(self.line.allowed)
        breaks = any(isinstance(event, Broken) for event in events)
        while True:
            self.monitor._recover(stopped=False)
            self.monitor._look_for_leave()
            if not breaks or len(self.line.allowed) > before:
                return
            if self.monitor._allowed_s != float("inf"):
                self.monitor._allowed_s = 0  # no test waits as long as a run
            time.sleep(0.01)


def seats(nodes: str) -> tuple[Seat, ...]:
    return tuple(Seat(node=one, address=one, host=one, pid=1) for one in nodes)


def at_work(attempt: int, nodes: str, images: int | None = None) -> list[Event]:
    news: list[Event] = [Started(attempt, seats(nodes)), Begun(attempt)]
    return news if images is None else [*news, Advanced(attempt, images)]


def failures(attempt: int, workers: int, kind: str = "raised") -> list[Failure]:
    text = "node c cannot train this run: no cache"
    return [
        Failure(rank=rank, attempt=attempt, kind=kind, text=text)  # type: ignore[arg-type]
        for rank in range(workers)
    ]


def test_a_run_whose_drivers_node_is_taken_away_saves_and_ends() -> None:
    """As after SIGTERM at the driver, but within the time that the node has left."""
    driver = Driver()
    driver.hear(*at_work(0, "ab", 8))
    assert not driver.monitor._look_for_stop()
    assert driver.line.stopped == []
    driver.watch.end = End(reason="the node of this launch is taken away in 150 s", grace_s=147.0)
    assert driver.monitor._look_for_stop()
    assert driver.line.stopped == [147.0]
    assert driver.monitor._caller.stop.is_set()
    assert "in 150 s; all workers save, and the run ends" in driver.told[-1]
    assert driver.line.asked == []  # nobody is started again

    driver = Driver()
    driver.monitor._caller.stop.set()  # by SIGTERM: nothing is known to hurry it but who sent that
    assert driver.monitor._look_for_stop()
    assert driver.line.stopped == [None]


@pytest.mark.parametrize("kind", ["refused", "raised", "died"])
def test_a_node_that_joins_and_is_unfit_does_not_end_a_healthy_run(kind: str) -> None:
    driver = Driver(max_failures=0)
    driver.hear(*at_work(0, "ab", 8), Kept(8))
    driver.watch.reason = Leave(kind="resize", reason="there is room for 4 of them", workers=4)
    driver.hear()
    driver.hear(Left(0, 0), Left(0, 1), Broken("workers", (), ""))
    assert driver.line.allowed == [(4, None)]
    driver.watch.reason = None
    failed = failures(1, 4, kind)
    driver.hear(*at_work(1, "abcc"), *failed, Broken("workers", tuple(failed), ""))
    assert driver.line.allowed[1:] == [(2, 2)]
    assert "no cache" in driver.told[-1]
    assert "so 2 start again at once" in driver.told[-1]
    assert driver.watch._grow == "never"
    driver.hear(*failed)  # late ones change nothing
    driver.hear(*at_work(2, "ab"))
    driver.hear(*failed)


def test_a_worker_that_joins_and_does_not_come_to_the_meeting_does_not_stay() -> None:
    driver = Driver(max_failures=0)
    driver.hear(*at_work(0, "ab", 8))
    driver.hear(Started(1, seats("abc")), absent(2))
    assert driver.line.allowed == [(2, 2)]
    assert "worker 2 on c; no update was made with 3 workers, so 2 start again" in driver.told[-1]


def test_a_refusal_of_the_first_workers_or_of_proven_ones_ends_the_run() -> None:
    driver = Driver()
    with pytest.raises(WorkerRefused, match="no cache"):
        driver.hear(*at_work(0, "ab"), *failures(0, 2, "refused"))
    driver = Driver()
    with pytest.raises(WorkerRefused, match="no cache"):
        driver.hear(*at_work(0, "ab", 8), *failures(0, 2, "refused"))


def test_a_refusal_of_a_node_that_takes_anothers_place_is_one_failure() -> None:
    driver = Driver(max_failures=2)
    driver.hear(*at_work(0, "ab", 8), *failures(0, 2), Broken("workers", (), ""))
    driver.hear(*at_work(1, "ac"), *failures(1, 2, "refused"), Broken("workers", (), ""))
    assert driver.line.allowed == [(2, None), (2, None)]
    assert "2 of 2 failures" in driver.told[-1]


def test_a_start_that_fails_is_not_judged_by_the_attempt_before() -> None:
    """Neither is it a resize without end, nor are failures counted twice."""
    driver = Driver(max_failures=1)
    driver.hear(*at_work(0, "ab", 8))
    driver.watch.reason = Leave(kind="resize", reason="there is room for 4 of them", workers=4)
    driver.hear()
    driver.hear(Left(0, 0), Left(0, 1), Broken("workers", (), ""))
    driver.hear(Broken("workers", (), "a worker was lost before they met"))
    assert "lost before they met" in driver.told[-1]
    assert "failed starts are not counted" in driver.told[-1]
    driver.watch.reason = None
    driver.hear(*at_work(1, "ab", 16), *failures(1, 2), Broken("workers", (), ""))
    assert "1 of 1 failures" in driver.told[-1]
    driver.hear(*failures(1, 2), Broken("workers", (), "again"))
    assert "failed starts are not counted" in driver.told[-1]


def test_workers_that_are_gone_are_not_asked_to_leave() -> None:
    driver = Driver()
    driver.hear(*at_work(0, "ab", 8), *failures(0, 2), Broken("workers", (), ""))
    driver.watch.reason = Leave(kind="preemption", reason="a is taken away")
    driver.hear()
    driver.hear(Started(1, seats("ab")))
    assert driver.line.asked == []
    driver.hear(Begun(1))
    assert driver.line.asked == [1]


def test_a_run_that_ends_by_notices_says_so_and_not_that_its_workers_could_not_be_run() -> None:
    driver = Driver(max_preemptions=0)
    driver.hear(*at_work(0, "ab", 8))
    driver.watch.reason = Leave(kind="preemption", reason="a (rank 0) is taken away in 120 s")
    driver.hear()
    with pytest.raises(WorkerFailed) as given_up:
        driver.hear(Left(0, 0), Left(0, 1), Broken("workers", (), "The worker was asked to leave."))
    assert str(given_up.value) == (
        "All workers left, since a (rank 0) is taken away in 120 s. They do not start again: "
        "cluster.max_preemptions=0 announced losses are spent, and no new checkpoint gave one back"
    )


def test_a_run_that_ends_since_a_worker_never_came_names_it() -> None:
    driver = Driver(room_timeout_s=1e-9)
    driver.hear(Started(0, seats("ab")), absent(1))
    with pytest.raises(WorkerFailed, match=r"could not be run: they .* 120 s: worker 1 on b"):
        driver.hear(Started(1, seats("ab")), absent(1))


def test_no_more_workers_start_than_the_driver_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = (Node(id="a", address="a", cpus=4, gpus=0),)
    for look in ("free_nodes", "live_nodes"):
        monkeypatch.setattr(ray_room, look, lambda: nodes)
    sizes = [WorkerGroupSpec(workers=n, group_size=1, cpus=1, gpus=0) for n in (2, 3, 4)]
    started = []
    for most in (None, 3, 2):
        line = SimpleNamespace(
            wanted=lambda: 2,
            most=lambda most=most: most,
            avoided=frozenset,
            admitted=lambda: None,
        )
        scaling = ScalingConfig(num_workers=4)
        policy = RoomPolicy(scaling, sizes, line, patience_s=9, may_grow=False)  # type: ignore[arg-type]
        started.append(policy.make_decision_for_non_running_worker_group().num_workers)
    assert started == [4, 3, 2]


def crash(attempt: int, rank: int) -> list[Event]:
    """A worker that fails, and another that loses it."""
    found = [
        Failure(rank=rank, attempt=attempt, kind="raised", text="RuntimeError: no device"),
        Failure(rank=1 - rank, attempt=attempt, kind="raised", text="RuntimeError: gloo: closed"),
    ]
    return [*found, Broken("workers", tuple(found), "")]


def test_a_node_on_which_failures_begin_again_and_again_is_avoided_and_said_so_once() -> None:
    driver = Driver(max_failures=9)
    driver.hear(*at_work(0, "ab", 8), *crash(0, 1))
    assert driver.line.avoided == frozenset()
    driver.hear(*at_work(1, "ab", 16), *crash(1, 1))
    assert driver.line.avoided == driver.watch._avoided == {"b"}
    assert [line for line in driver.told if "is avoided" in line] == driver.told[-1:]
    assert "b (b) is avoided while other nodes suffice: 2 failures in a row" in driver.told[-1]
    driver.hear(*at_work(2, "ac", 24), *crash(2, 0))
    assert driver.line.avoided == {"b"}
    driver.hear(Readmitted())
    assert driver.watch._avoided == frozenset()
    assert "no node is avoided any more" in driver.told[-1]
    driver.hear(*at_work(3, "ab", 32), *crash(3, 1))
    assert driver.line.avoided == frozenset()


def test_failures_that_begin_on_one_node_and_on_another_blame_none() -> None:
    driver = Driver(max_failures=9)
    for attempt in range(6):
        driver.hear(*at_work(attempt, "ab", 8 * attempt), *crash(attempt, attempt % 2))
    assert driver.line.avoided == frozenset()


def test_what_all_workers_raise_alike_blames_no_node() -> None:
    """As a store that is down, or a refusal that all of them agree on."""
    driver = Driver(max_failures=9)
    for attempt in range(4):
        alike = failures(attempt, 2)
        driver.hear(*at_work(attempt, "ab", 8 * attempt), *alike, Broken("workers", (), ""))
    assert driver.line.avoided == frozenset()


def not_joined(rank: int, text: str) -> Broken:
    """What the driver hears where a worker cannot enter the group, by way of Ray's own errors."""
    cause = pickle.loads(pickle.dumps(NotJoined(rank, text)))
    error = RayTaskError("_enter", "", cause).make_dual_exception_instance()
    return ray_controller.describe_failure(ControllerError(error))


def test_a_worker_that_cannot_enter_the_group_is_named_and_its_node_is_blamed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_loss, "_PEER_GRACE_S", 0.01)
    driver = Driver(max_failures=9)
    for attempt in range(2):
        driver.hear(Started(attempt, seats("ab")), not_joined(1, "RuntimeError: no CUDA device"))
    assert "worker 1 on b failed with RuntimeError: no CUDA device" in driver.told[-2]
    assert driver.line.avoided == {"b"}


def absent(*ranks: int) -> Broken:
    """What the driver hears where the first worker has waited for others in vain."""
    cause = pickle.loads(pickle.dumps(WorkersAbsent(ranks, "they did not come within 120 s")))
    error = RayTaskError("_enter", "", cause).make_dual_exception_instance()
    broken = ray_controller.describe_failure(ControllerError(error))
    assert broken == ray_controller.describe_failure(ControllerError(cause))  # its own finding
    return broken


def test_a_meeting_that_a_worker_does_not_come_to_is_a_failed_start_and_its_node_is_named() -> None:
    """Those who waited are not to blame, and nothing is charged."""
    driver = Driver(max_failures=0, max_failures_of_node=2)
    driver.hear(*at_work(0, "ab", 64))
    for attempt in (1, 2):
        driver.hear(Started(attempt, seats("ab")), absent(1))
        (line,) = [one for one in driver.told if f"attempt {attempt}: they" in one]
        assert "within 120 s: worker 1 on b" in line
        assert "failed starts are not counted" in line
    assert driver.line.avoided == {"b"}
    assert "b (b) is avoided while other nodes suffice" in driver.told[-1]


def test_a_meeting_that_is_missed_from_everywhere_or_by_nobody_knows_whom_blames_no_node() -> None:
    driver = Driver(max_failures=0)
    driver.hear(*at_work(0, "ab", 64))
    for attempt, ranks in enumerate([(0, 1), (0, 1), (), ()], start=1):
        driver.hear(Started(attempt, seats("ab")), absent(*ranks))
    assert driver.line.avoided == frozenset()


def test_processes_that_do_not_come_up_in_time_are_ended_and_it_is_a_failed_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray Train would wait for them without an end."""
    group, given_up = Group.__new__(Group), threading.Event()
    group._worker_group_start_timeout_s = 0.01
    monkeypatch.setattr(group, "end", given_up.set)
    with (
        pytest.raises(WorkersAbsent, match=r"came up within 0.01 s \(cluster") as late,
        group._bounding(),
    ):
        lose_workers(given_up)
    assert ray_controller.describe_failure(ControllerError(late.value)).kind == "start"
    group._worker_group_start_timeout_s = 600
    with pytest.raises(RayActorError), group._bounding():
        lose_workers(given_up)


def lose_workers(given_up: threading.Event) -> None:
    """As Ray Train, where their room is given back while it waits for them."""
    assert given_up.wait(60)
    raise RayActorError


def test_a_worker_that_only_lost_another_is_not_to_blame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_loss, "_PEER_GRACE_S", 0.01)
    driver = Driver(max_failures=9)
    for attempt in range(3):
        driver.hear(Started(attempt, seats("ab")), not_joined(1, "RuntimeError: gloo: timed out"))
    assert driver.line.avoided == frozenset()


def test_workers_start_beside_a_node_that_is_avoided_while_there_is_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = {name: Node(id=name, address=name, cpus=1, gpus=0) for name in "abc"}
    monkeypatch.setattr(ray_room, "_LOOK_S", 0.0)
    monkeypatch.setattr(ray_room, "live_nodes", lambda: tuple(free.values()))
    busy = {name: free[name] for name in "ab"}
    looks = [tuple(busy.values()), tuple(free.values())]
    monkeypatch.setattr(
        ray_room, "free_nodes", lambda: looks.pop(0) if len(looks) > 1 else looks[0]
    )
    readmitted: list[str] = []
    line = SimpleNamespace(
        wanted=lambda: 2,
        most=lambda: None,
        avoided=lambda: frozenset("b"),
        admitted=lambda: None,
        tell_lacking=readmitted.append,
        readmit=lambda: readmitted.append("all"),
    )
    sizes = [WorkerGroupSpec(workers=2, group_size=1, cpus=1, gpus=0)]
    scaling = ScalingConfig(num_workers=2)

    def policy() -> RoomPolicy:
        return RoomPolicy(scaling, sizes, line, patience_s=600, may_grow=False)  # type: ignore[arg-type]

    def selector(of: RoomPolicy) -> dict[str, str] | None:
        return of.on_controller_start_worker_group(scaling_config=scaling, num_workers=2)

    waiting = policy()
    assert isinstance(waiting.make_decision_for_non_running_worker_group(), NoopDecision)
    assert "room for 1" in readmitted.pop()
    assert waiting.make_decision_for_non_running_worker_group().num_workers == 2
    assert (selector(waiting), readmitted) == ({"ray.io/node-id": "!in(b)"}, [])
    del free["c"]  # idle or not, the others cannot hold them now
    looks[:] = [tuple(free.values())]
    vain = policy()
    assert vain.make_decision_for_non_running_worker_group().num_workers == 2
    assert (selector(vain), readmitted) == (None, ["all"])
    free["silent"] = Node(id="silent", address="d", cpus=9, gpus=0)  # alive, as Ray has it
    line.avoided = frozenset
    beside = policy()
    assert beside.make_decision_for_non_running_worker_group().num_workers == 2
    assert selector(beside) == {"ray.io/node-id": "!in(silent)"}
