"""To which nodes ranks go, on a real Ray cluster of uneven nodes: shared ones, and fit ones."""

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster import ray_gate
from cluster.assignment import WorkerGroupSpec
from cluster.contract import ClusterConfig, ClusterTooSmall, Message, Payload, WorkerContext
from cluster.launcher import run
from cluster.node_check import Judgement, NodeCheck, NodePlace, Sight, UnfitNodes
from cluster.ray_ear import Ear
from cluster.ray_gate import NodeGate
from cluster.ray_mailbox import open_mailbox
from cluster.ray_nodes import is_reachable, live_nodes
from tests.support.ray_cluster import HOST, RayCluster, ray_cluster

pytestmark = pytest.mark.slow

CPUS = {HOST: 2, "127.0.0.3": 3, "127.0.0.4": 3}
"""By address of the node: room for eight workers, and for three pairs of them."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    head, *more = CPUS.values()
    with (
        pytest.MonkeyPatch.context() as patch,
        ray_cluster(cpus=head, more_cpus=more, dashboard=False) as cluster,
    ):
        patch.setenv("RAY_AUTH_MODE", cluster.environment["RAY_AUTH_MODE"])
        yield cluster


def tell_node(context: WorkerContext, payload: Payload) -> None:
    """Tells where it runs and whether it asks the driver, or another of its node does for it.

    In the first attempt it goes on until a node is lost.
    """
    import torch.distributed as dist

    (ear,) = [each for each in threading.enumerate() if isinstance(each, Ear)]
    limit = time.monotonic() + 540
    while ear._answers + ear._seen == 0:
        assert time.monotonic() < limit
        time.sleep(0.1)
    context.report(
        {
            "asks": ear._answers > 0,
            "rank": context.rank,
            "attempt": context.attempt,
            "node": ray.get_runtime_context().get_node_id(),
            "address": ray.util.get_node_ip_address(),
        }
    )
    while context.attempt == 0:
        assert time.monotonic() < limit
        dist.barrier()
        time.sleep(0.05)


def tell_address(context: WorkerContext, payload: Payload) -> None:
    """Tells where it runs."""
    address = ray.util.get_node_ip_address()
    context.report({"rank": context.rank, "attempt": context.attempt, "address": address})


def seats(messages: list[Message], attempt: int, key: str = "address") -> list[Any]:
    """The node of each rank, or what else it told, in the order of ranks."""
    told = {one["rank"]: one[key] for one in messages if one["attempt"] == attempt}
    return [told[rank] for rank in sorted(told)]


def see_ailment(place: NodePlace, payload: Payload) -> Payload:
    """What a node sees that has the ailment of the file of its name."""
    file = Path(payload["ailments"], place.address)
    match file.read_text() if file.exists() else "":
        case "is mute":
            time.sleep(540)
        case "raises":
            raise OSError("no such disk")
        case "lacks code":
            raise ModuleNotFoundError("No module named 'trainer'")
    return {"reaches": is_reachable(place.peer)}


def judge(sights: Sequence[Sight]) -> Judgement:
    """Those are unfit that did not answer."""
    unfit = {one.node: (f"{one.place.address}: {one.error}",) for one in sights if one.error}
    assert all(one.report is None or one.report["reaches"] for one in sights)
    return Judgement(unfit=unfit, warnings={}, table="\n".join(one.node for one in sights))


@pytest.fixture
def check(tmp_path: Path) -> NodeCheck:
    return NodeCheck(look=see_ailment, payload={"ailments": str(tmp_path)}, judge=judge)


def test_nodes_that_are_unfit_are_left_out_and_looked_at_again(
    cluster: RayCluster, check: NodeCheck, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_gate, "_AGAIN_S", 0.0)
    lines: list[str] = []
    mute, ill = "127.0.0.3", "127.0.0.4"
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        mailbox = open_mailbox(ClusterConfig(workers=2))

        def gate(workers: int, patience_s: float = 540.0) -> NodeGate:
            spec = WorkerGroupSpec(workers=workers, group_size=1, cpus=1, gpus=0)
            return NodeGate(check, [spec], mailbox, patience_s=patience_s, report=lines.append)

        began = time.monotonic()
        fit = gate(8).open(live_nodes(), threading.Event())
        assert fit is not None
        assert sorted(node.address for node in fit) == sorted(CPUS)
        assert len(lines) == len(CPUS)  # the table alone
        # On this machine, now, those that answer have done so by then.
        patience_s = round(5 + 4 * (time.monotonic() - began))

        (tmp_path / mute).write_text("is mute")
        (tmp_path / ill).write_text("raises")
        with pytest.raises(UnfitNodes) as refused:
            gate(8, patience_s).open(live_nodes(), threading.Event())
        text = str(refused.value)
        assert text.startswith("3 nodes cannot train together: ")
        assert f"{mute}: it has not answered for {patience_s} s (cluster.preflight_s)" in text
        assert f"{ill}: it could not be looked at: OSError: no such disk" in text
        assert text.endswith("The others have room for 2 of 8 workers.")

        (tmp_path / ill).write_text("lacks code")
        smaller = gate(2, patience_s)
        fit = smaller.open(live_nodes(), threading.Event())
        assert fit is not None
        assert [node.address for node in fit] == [HOST]
        assert mailbox.admitted() == frozenset([cluster.node_id(HOST)])
        assert sum(line.startswith("warning: no worker goes to 127.0.0.") for line in lines) == 2
        assert any(f"{ill}: it does not find this process's code" in line for line in lines)

        (tmp_path / ill).unlink()
        limit = time.monotonic() + 540
        while mailbox.admitted() != frozenset(map(cluster.node_id, (HOST, ill))):
            assert time.monotonic() < limit
            smaller.look()
            time.sleep(0.1)
        assert lines.count(f"{ill} has come, and is fit for workers") == 1
        assert smaller.is_fit(cluster.node_id(ill))
        assert not smaller.is_fit(cluster.node_id(mute))

        asked = threading.Event()
        asked.set()
        assert gate(2).open(live_nodes(), asked) is None  # a stop does not wait for the mute
    finally:
        ray.shutdown()


def test_no_worker_goes_to_an_unfit_node(
    cluster: RayCluster, check: NodeCheck, tmp_path: Path
) -> None:
    """Though it has more room than the others."""
    (tmp_path / "127.0.0.3").write_text("raises")
    messages: list[Message] = []
    lines: list[str] = []
    run(
        ClusterConfig(workers=4, gpus_per_worker=0, address=cluster.address),
        tell_address,
        {},
        on_message=messages.append,
        report=lines.append,
        stop=threading.Event(),
        check=check,
    )
    assert set(seats(messages, 0)) == {HOST, "127.0.0.4"}
    assert any(line.startswith("warning: no worker goes to 127.0.0.3: ") for line in lines)


def test_pairs_that_do_not_fit_are_refused_though_single_workers_would(
    cluster: RayCluster,
) -> None:
    with pytest.raises(ClusterTooSmall) as caught:
        run(
            ClusterConfig(workers=8, gpus_per_worker=0, address=cluster.address),
            tell_node,
            {},
            on_message=lambda message: None,
            stop=threading.Event(),
            group_size=2,
        )

    text = str(caught.value)
    assert "4 groups of 2 workers do not fit" in text
    assert "each needs 2 CPUs on one node, and there is room for 3" in text
    for node, cpus in CPUS.items():
        assert f"{node} has {cpus} CPUs, room for 1" in text


def test_pairs_share_a_node_also_after_one_was_lost(cluster: RayCluster) -> None:
    messages: list[Message] = []
    lost: list[str] = []

    def take(message: Message) -> None:
        messages.append(message)
        if not lost and len(seats(messages, 0)) == 4:
            lost.append(next(node for node in seats(messages, 0) if node != HOST))
            cluster.lose(lost[0])

    outcome = run(
        ClusterConfig(workers=4, gpus_per_worker=0, address=cluster.address, max_failures=1),
        tell_node,
        {},
        on_message=take,
        stop=threading.Event(),
        group_size=2,
    )

    assert outcome.restarts == 1
    for attempt in (0, 1):
        # By itself Ray would fill a node of three CPUs with three workers.
        first, second, third, fourth = seats(messages, attempt, "node")
        assert first == second != third == fourth
        assert seats(messages, attempt, "asks") == [True, False, True, False]
    # Nobody waits for the node that is gone.
    assert set(seats(messages, 1)) == set(CPUS) - set(lost)
