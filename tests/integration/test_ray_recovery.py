"""What happens to a run on a real Ray cluster when its workers, its nodes or its driver are lost.

One cluster serves all tests.
"""

import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR

from cluster import ray_mailbox, ray_spares, ray_worker
from cluster.contract import Message
from cluster.failure import WorkerFailed
from cluster.process_group import Rendezvous
from cluster.ray_nodes import avoiding
from tests.support.counting_run import BATCH, INTERVAL, LIMIT_S, Story, launch, warm_up
from tests.support.ray_cluster import HOST, RayCluster, ray_cluster

pytestmark = pytest.mark.slow

OTHER, NEW, NEWER, SPARE, LAST = (f"127.0.0.{number}" for number in range(3, 8))


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with (
        pytest.MonkeyPatch.context() as patch,
        ray_cluster(cpus=1, more_cpus=[1], dashboard=False) as cluster,
    ):
        patch.setenv("RAY_AUTH_MODE", cluster.environment["RAY_AUTH_MODE"])
        yield cluster


def processes(cluster: RayCluster, title: str, address: str = "") -> list[psutil.Process]:
    """Those of the cluster, or of one node, whose title begins so."""
    found: list[psutil.Process] = []
    for node in [cluster.nodes[address]] if address else cluster.nodes.values():
        for one in psutil.Process(node.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # or it is a zombie
                if " ".join(one.cmdline()).startswith(title):
                    found.append(one)
    return found


def idle_with_hook(cluster: RayCluster) -> list[psutil.Process]:
    """Processes without work that were started in the environment of a run's workers."""
    found = []
    for one in processes(cluster, "ray::IDLE"):
        with suppress(psutil.NoSuchProcess):
            if WORKER_PROCESS_SETUP_HOOK_ENV_VAR in one.environ():
                found.append(one)
    return found


class Spares:
    """Lets a run's faults happen as soon as each node has a spare process.

    Attributes:
        go: For the payload.
        pids: The spare processes, by attempt.
        seen: All of them.
    """

    def __init__(self, cluster: RayCluster, folder: Path) -> None:
        self.go = folder / "go"
        self.pids: list[set[int]] = []
        self.seen: list[psutil.Process] = []
        self._cluster = cluster

    def watch(self, message: Message) -> None:
        """Begin to look for them when an attempt begins."""
        if "from" in message and message["rank"] == 1 and message["attempt"] < 3:
            threading.Thread(target=self._wait, args=(message["attempt"],)).start()

    def _wait(self, attempt: int) -> None:
        limit = time.monotonic() + LIMIT_S
        while len(there := idle_with_hook(self._cluster)) < 2:
            assert time.monotonic() < limit
            time.sleep(0.1)
        self.seen += there
        self.pids.append({one.pid for one in there})
        self.go.with_suffix(f".{attempt}").touch()


def test_failures_with_new_checkpoints_between_them_never_end_a_run(
    cluster: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spare processes take the place of lost workers: new ones, each once, and none stays."""
    monkeypatch.setattr(ray_spares, "AFTER_S", 0.0)
    story, spares = Story(), Spares(cluster, tmp_path)
    outcome = launch(
        cluster,
        story,
        {
            "saved": str(tmp_path / "saved"),
            "total": 200,
            "faults": {"0:70": "kill", "1:120": "raise", "2:170": "end"},
            "go": str(spares.go),
        },
        watch=spares.watch,
        max_failures=1,
        warm_up=warm_up,
    )

    pids = [
        {one["pid"] for one in story.messages if one.get("attempt") == attempt and "pid" in one}
        for attempt in range(4)
    ]
    assert pids[1:] == spares.pids  # one on each node, and none of the attempts before
    assert all(not one & other for one, other in pairwise(pids))
    assert {one["warmed"] for one in story.messages if "warmed" in one} == {1}
    _, alive = psutil.wait_procs(spares.seen, timeout=LIMIT_S)
    assert not alive
    assert (outcome.status, outcome.restarts) == ("finished", 3)
    assert story.starts() == [0, 50, 100, 150]
    table = [line for line in story.lines if " attempt 0: " in line][:3]
    assert table[0].endswith("attempt 0: 2 workers on 2 nodes")
    assert {re.sub(r".*(rank \d) on ([\d.]+) .*", r"\1", line) for line in table[1:]} == {
        "rank 0",
        "rank 1",
    }
    lost = story.line(r"attempt 0: worker 1 on 127")
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ attempt 0: worker 1 on 127\.0\.0\.\d", lost)
    assert "was lost with its process" in lost
    assert "70 images were trained, 50 images are saved; the workers start again at once" in lost
    assert "1 of 1 failures (cluster.max_failures" in lost
    places = [line for line in story.lines if "worker 1: Ray's logs of it are in" in line]
    assert len(places) == 2
    assert all(f"in {cluster.logs} on 127.0.0." in line for line in places)
    ended = story.line(r"attempt 2: worker 1 on 127\.0\.0\.\d stood still, or was out of its")
    assert re.search(r"itself with exit code 75.*; 170 images were trained, 150 images are", ended)
    assert [(one.attempt, one.ranks) for one in story.lost] == [(0, (1,)), (2, (1,))]
    check_lines(story.lines)
    raised = story.line(r"attempt 1: worker 1 on 127\.0\.0\.\d failed with KeyError: 'no such")
    assert "120 images were trained, 100 images are saved" in raised
    assert "1 of 1 failures" in raised


def check_lines(lines: list[str]) -> None:
    """Each line of each rank is there once, with rank and node, and the last ones of the dead."""
    own = [line for line in lines if re.match(r"worker \d on 127\.0\.0\.\d: ", line)]
    told = [re.sub(r"^worker (\d) on \S+: ", r"\1 ", line) for line in own]
    for word in ("1 the colour is red", "1 the end is near"):
        assert told.count(word) == 2
    for attempt, (first, last) in enumerate([(10, 70), (60, 120), (110, 170), (160, 200)]):
        for images in range(first, last + 1, BATCH):
            for word in ("printed", "logged"):
                for rank in (0, 1):
                    line = f"{rank} {word} {images} in attempt {attempt}"
                    assert told.count(line) == 1, line


def test_failing_at_the_same_place_ends_a_run_whatever_its_budget(
    cluster: RayCluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    story = Story()
    faults = {f"{attempt}:80": "raise" for attempt in range(9)}
    with pytest.raises(WorkerFailed, match="no such colour") as failed:
        launch(
            cluster,
            story,
            {"saved": str(tmp_path / "saved"), "total": 200, "faults": faults},
            max_failures=100,
            max_failures_in_place=2,
        )

    assert f"Ray's logs of it are in {cluster.logs} on 127.0.0." in str(failed.value)
    assert f"Ray's logs are in {cluster.logs} on each of its nodes: 127.0.0." in caplog.text
    assert story.starts() == [0, 50]
    assert "are not started again: it is failure 2 in a row after the same 80 images" in (
        story.line("attempt 1: worker 1")
    )


def test_a_node_on_which_workers_fail_again_and_again_is_left_alone(
    cluster: RayCluster, tmp_path: Path
) -> None:
    """Both nodes are needed until another comes, after the first failure and before the second."""
    story, bad = Story(), tmp_path / "bad"

    def spare(message: Message) -> None:
        if message.get("attempt") == 1 and message["rank"] == 0:
            threading.Thread(target=bring).start()

    def bring() -> None:
        cluster.add(SPARE, 1)
        (tmp_path / "bad again").touch()

    outcome = launch(
        cluster,
        story,
        {
            "saved": str(tmp_path / "saved"),
            "total": 200,
            "bad": str(bad),
        },
        watch=spare,
        max_failures=2,
    )

    cluster.lose(SPARE)
    assert (outcome.status, outcome.restarts) == ("finished", 2)
    address = bad.read_text()
    assert story.line("is avoided").endswith(
        f"{address} ({socket.gethostname()}) is avoided while other nodes suffice: 2 failures in a "
        "row began there, and none elsewhere (cluster.max_failures_of_node=2)"
    )
    seats = [line for line in story.lines if re.search(r"attempt 2: rank \d on", line)]
    assert len(seats) == 2
    assert not [line for line in seats if f" on {address} " in line]


def test_a_worker_that_stands_still_before_it_meets_the_others_is_named_and_replaced(
    cluster: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No failure is charged: there is none to give."""
    story = Story()
    places: list[Rendezvous] = []

    def stop_one(*, timeout_s: float, **given: Any) -> Rendezvous:
        if not places:
            timeout_s = 3.0
            (node,) = wait_for(story, r"attempt 0: rank 1 on ([\d.]+)")
            (worker,) = processes(cluster, "ray::RayTrainWorker", node)
            worker.suspend()
        places.append(Rendezvous(timeout_s=timeout_s, **given))
        return places[-1]

    monkeypatch.setattr(ray_worker, "Rendezvous", stop_one)
    outcome = launch(
        cluster,
        story,
        {"saved": str(tmp_path / "saved"), "total": 50},
        max_failures=0,
    )

    assert (outcome.status, outcome.restarts, len(places)) == ("finished", 1, 2)
    late = story.line(r"attempt 0: 1 of 2 workers did not come to meet the others within 3 s")
    assert re.search(r": worker 1 on 127\.0\.0\.\d; nothing is saved; the workers start ag", late)
    assert "failed starts are not counted" in late


def wait_for(story: Story, pattern: str) -> tuple[str, ...]:
    """What is in the groups of the first line of that pattern, once it is told."""
    limit = time.monotonic() + LIMIT_S
    while not (found := [one for line in story.lines if (one := re.search(pattern, line))]):
        assert time.monotonic() < limit
        time.sleep(0.05)
    return found[0].groups()


def test_ray_knows_a_selector_of_all_nodes_but_some(cluster: RayCluster) -> None:
    """Whichever of two nodes it is that is to be left alone."""
    import ray

    ray.init(address=cluster.address, log_to_driver=False)
    try:
        for address, other in ((HOST, OTHER), (OTHER, HOST)):
            group = ray.util.placement_group(
                [{"CPU": 1}], bundle_label_selector=[avoiding({cluster.node_id(address)})]
            )
            assert group.wait(LIMIT_S)
            (node,) = ray.util.placement_group_table(group)["bundles_to_node_id"].values()
            assert node == cluster.node_id(other)
            ray.util.remove_placement_group(group)
    finally:
        ray.shutdown()


def test_workers_leave_a_driver_that_does_not_answer(
    cluster: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They end by themselves, and the run goes on once the driver is there again."""
    monkeypatch.setattr(ray_mailbox, "ANSWER_S", 6.0)
    story = Story()
    workers: list[psutil.Process] = []

    def cut(message: Message) -> None:
        if "from" not in message or workers or len(story.messages) < 2:
            return
        (box,) = processes(cluster, "ray::Box")
        workers.extend(processes(cluster, "ray::RayTrainWorker"))
        box.suspend()
        threading.Thread(target=back, args=(box,)).start()

    def back(box: psutil.Process) -> None:
        psutil.wait_procs(workers, timeout=LIMIT_S)
        box.resume()

    launch(
        cluster,
        story,
        {"saved": str(tmp_path / "saved"), "total": 1000, "step_s": 0.5, "last_attempt": 1},
        watch=cut,
        max_failures=1,
    )

    assert workers
    assert not any(worker.is_running() for worker in workers)
    assert len(story.starts()) == 2
    assert "out of reach" in "\n".join(story.lines)


def test_a_node_that_is_taken_away_costs_no_work(cluster: RayCluster, tmp_path: Path) -> None:
    """Its workers save at once; the run waits for another node, and goes on from there."""
    story = Story()

    def announce(message: Message) -> None:
        if message.get("attempt") == 0 and len(story.messages) == 2:
            cluster.drain(OTHER, 60)

    def replace(line: str) -> None:
        if "waiting for room" in line and NEW not in cluster.nodes:
            cluster.lose(OTHER)
            cluster.add(NEW, 1)

    outcome = launch(
        cluster,
        story,
        {"saved": str(tmp_path / "saved"), "total": 600, "step_s": 0.2, "last_attempt": 1},
        watch=announce,
        look=replace,
        max_failures=0,
    )

    assert outcome.restarts == 1
    (left,) = {one["left"] for one in story.messages if "left" in one}
    assert 0 < left < 600
    assert story.starts() == [0, left]
    for message in story.messages:
        if "left" in message:
            assert 0 < message["grace_s"] < 60
    assert re.search(rf"{OTHER} \(rank \d\) is taken away in \d+ s", story.line("save and leave"))
    assert "1 of 20 announced losses" in story.line("all workers left")
    waiting = story.line("waiting for room")
    assert re.search(r"for 2 workers: 1 node answers .* room for 1, since \d\d:\d\d:\d\dZ", waiting)


def test_a_run_shrinks_where_a_node_is_lost_and_grows_where_one_comes(
    cluster: RayCluster, tmp_path: Path
) -> None:
    story = Story()

    def lose(message: Message) -> None:
        if message.get("attempt") == 0 and len(story.messages) == 2:
            cluster.lose(NEW)
        elif message.get("attempt") == 1:
            threading.Thread(target=cluster.add, args=(NEWER, 1)).start()

    outcome = launch(
        cluster,
        story,
        {"saved": str(tmp_path / "saved"), "total": 4000, "step_s": 0.1, "last_attempt": 2},
        watch=lose,
        fewer={1: 1},
        max_failures=1,
        shrink_after_s=3,
    )

    assert outcome.restarts == 2
    assert [len([one for one in story.messages if one.get("attempt") == n]) for n in range(3)] == [
        2,
        1,
        2,
    ]
    assert f"{NEW} (the node does not answer)" in story.line("attempt 0: worker .* start again")
    (left,) = [one["left"] for one in story.messages if "left" in one]
    assert story.starts()[2] == left
    assert left - story.starts()[1] > INTERVAL  # a checkpoint came before
    assert "there is room for 2 of them" in story.line("attempt 1: .* all workers save and leave")
    assert "start again at once: there is room for more" in story.line("attempt 1: all workers le")


def test_a_node_that_is_lost_for_good_ends_a_run_by_time_alone(
    cluster: RayCluster, tmp_path: Path
) -> None:
    story = Story()

    def lose(message: Message) -> None:
        if len(story.messages) == 2:
            cluster.lose(NEWER)

    with pytest.raises(WorkerFailed, match=r"cannot be started since .* room for 1"):
        launch(
            cluster,
            story,
            {"saved": str(tmp_path / "saved"), "total": 100_000, "step_s": 0.2},
            watch=lose,
            max_failures=1,
            room_timeout_s=12,
        )
    assert f"{NEWER} (the node does not answer)" in story.line("the workers start again")
    assert HOST in story.line("waiting for room")


def test_a_run_ends_saved_when_the_drivers_own_node_is_asked_to_end(
    cluster: RayCluster, tmp_path: Path
) -> None:
    """SIGTERM at `ray start --head --block`, as an evicted pod gets it; the head goes with it."""
    cluster.add(LAST, 1)
    story, saved = Story(), tmp_path / "saved"

    def announce(message: Message) -> None:
        if len(story.messages) == 2:
            cluster.nodes[HOST].send_signal(signal.SIGTERM)

    outcome = launch(
        cluster,
        story,
        {"saved": str(saved), "total": 100_000, "step_s": 0.1},
        watch=announce,
    )

    assert (outcome.status, outcome.restarts) == ("stopped", 0)
    left, also = (message for message in story.messages if "left" in message)
    assert left["left"] == also["left"] == int(saved.read_text()) > 0
    assert 0 < left["grace_s"] < 30
    assert story.line(r"this launch is taken away in \d+ s; all workers save, and the run ends")
