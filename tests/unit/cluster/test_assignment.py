import threading
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.assignment import (
    Node,
    WorkerGroupSpec,
    assign_nodes,
    require_same_node,
    require_whole_groups,
)
from cluster.contract import ClusterConfig, ClusterConfigError, ClusterTooSmall
from cluster.launcher import run


def node(name, *, cpus, gpus=0):
    return Node(id=name, address=f"at-{name}", cpus=cpus, gpus=gpus)


def spec(workers, group_size, *, cpus=1, gpus=0):
    return WorkerGroupSpec(workers=workers, group_size=group_size, cpus=cpus, gpus=gpus)


def test_a_group_is_not_torn_apart_to_fill_a_node():
    nodes = [node("a", cpus=3), node("b", cpus=5)]
    assert assign_nodes(spec(6, 2), nodes) == ("b", "b", "b", "b", "a", "a")


def test_of_equal_nodes_the_earlier_is_taken():
    nodes = [node(name, cpus=4) for name in "abc"]
    assert assign_nodes(spec(8, 4), nodes) == ("a",) * 4 + ("b",) * 4


def test_gpus_count_as_cores_do():
    nodes = [node("a", cpus=64, gpus=3), node("b", cpus=7, gpus=8), node("c", cpus=64, gpus=8)]
    # b has GPUs for eight workers, and cores for three.
    assigned = assign_nodes(spec(10, 2, cpus=2, gpus=1), nodes)
    assert assigned == ("c",) * 8 + ("a",) * 2


def test_groups_that_do_not_fit_are_refused_with_numbers_and_the_fix():
    nodes = [node("a", cpus=3), node("b", cpus=3)]
    assert assign_nodes(spec(6, 1), nodes) == ("a",) * 3 + ("b",) * 3
    with pytest.raises(ClusterTooSmall) as caught:
        assign_nodes(spec(6, 2), nodes)
    text = str(caught.value)
    assert "3 groups of 2 workers do not fit" in text
    assert "each needs 2 CPUs on one node, and there is room for 2" in text
    assert "at-a has 3 CPUs, room for 1; at-b has 3 CPUs, room for 1" in text
    assert "smaller expert groups" in text
    assert "add nodes" in text


@st.composite
def clusters(draw):
    nodes = [
        node(str(index), cpus=draw(st.integers(0, 9)), gpus=draw(st.integers(0, 9)))
        for index in range(draw(st.integers(0, 6)))
    ]
    group_size = draw(st.integers(1, 4))
    workers = group_size * draw(st.integers(1, 8))
    cpus, gpus = draw(st.integers(1, 3)), draw(st.integers(0, 1))
    return nodes, spec(workers, group_size, cpus=cpus, gpus=gpus)


def groups_on(one, asked):
    """By trial: as many groups as the node's cores and GPUs can carry."""
    groups = 0
    while (groups + 1) * asked.group_size * asked.cpus <= one.cpus and (
        (groups + 1) * asked.group_size * asked.gpus <= one.gpus
    ):
        groups += 1
    return groups


@given(clusters())
def test_groups_share_a_node_within_its_means_on_the_fewest_nodes(cluster):
    nodes, asked = cluster
    room = {one.id: groups_on(one, asked) for one in nodes}
    if sum(room.values()) < asked.groups:
        with pytest.raises(ClusterTooSmall):
            assign_nodes(asked, nodes)
        return
    assigned = assign_nodes(asked, nodes)
    assert len(assigned) == asked.workers
    require_same_node(assigned, asked.group_size)
    for one in nodes:
        mine = [rank for rank, where in enumerate(assigned) if where == one.id]
        assert len(mine) <= room[one.id] * asked.group_size
        assert mine == list(range(mine[0], mine[-1] + 1)) if mine else True
    fewer = combinations(room.values(), len(set(assigned)) - 1)
    assert all(sum(some) < asked.groups for some in fewer)


@pytest.mark.parametrize(
    ("nodes", "group_size"),
    [(["a"], 1), (["a", "b", "a"], 1), (["a", "a", "b", "b"], 2), ([], 3)],
)
def test_ranks_that_share_a_node_pass(nodes, group_size):
    require_same_node(nodes, group_size)


def test_ranks_that_were_torn_apart_are_named():
    with pytest.raises(RuntimeError, match="Ranks 2 to 3 must share a node, but run on a, b"):
        require_same_node(["a", "a", "a", "b"], 2)


def test_workers_that_are_no_whole_number_of_groups_are_refused():
    require_whole_groups(6, 3)
    with pytest.raises(ClusterConfigError, match=r"workers is 6, which is no multiple of 4"):
        require_whole_groups(6, 4)
    with pytest.raises(ClusterConfigError, match="group_size is 0"):
        require_whole_groups(6, 0)


@pytest.mark.parametrize("backend", ["local", "ray"])
def test_they_are_refused_before_anything_starts(backend):
    def worker(context, payload):
        raise AssertionError

    with pytest.raises(ClusterConfigError, match="no multiple of 4"):
        run(
            ClusterConfig(backend=backend, workers=6),
            worker,
            {},
            on_message=lambda message: None,
            stop=threading.Event(),
            group_size=4,
        )
