"""What follows a fault, over all histories of faults that chance thinks of."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from cluster.contract import ClusterConfig
from cluster.recovery import (
    Decision,
    Fault,
    History,
    choose_workers,
    decide,
    must_readmit,
    readmit,
)

CONFIGS = st.builds(
    ClusterConfig,
    max_failures=st.integers(0, 6),
    max_failures_in_place=st.integers(0, 4),
    max_failures_of_node=st.integers(0, 4),
    max_preemptions=st.integers(0, 6),
    room_timeout_s=st.floats(1, 10_000),
)
KINDS = st.sampled_from(["crash", "node", "start", "preemption"])


@st.composite
def runs(draw: st.DrawFn, kinds: st.SearchStrategy[str] = KINDS) -> list[Fault]:
    """Faults in the order of time; saves only grow."""
    faults: list[Fault] = []
    at_s, saves = 0.0, 0
    for kind in draw(st.lists(kinds, min_size=1, max_size=12)):
        at_s += draw(st.floats(0, 1000))
        saves += draw(st.integers(0, 2))
        images = draw(st.none() | st.integers(0, 5))
        node = draw(st.sampled_from(["a", "b", None]))
        faults.append(Fault(kind=kind, at_s=at_s, images=images, saves=saves, node=node))  # type: ignore[arg-type]
    return faults


def decisions(faults: list[Fault], config: ClusterConfig) -> list[Decision]:
    """Of all faults up to the one that ends the run."""
    history, made = History(), []
    for fault in faults:
        history, decision = decide(history, fault, config)
        made.append(decision)
        if decision.action == "stop":
            break
    return made


@given(runs(st.sampled_from(["crash", "node"])), CONFIGS)
def test_a_run_that_saves_between_its_failures_never_ends(
    faults: list[Fault], config: ClusterConfig
) -> None:
    config = replace(config, max_failures=max(1, config.max_failures), max_failures_in_place=0)
    saving = [replace(fault, saves=index) for index, fault in enumerate(faults)]
    assert {made.action for made in decisions(saving, config)} == {"retry"}
    assert {made.wait_s for made in decisions(saving, config)} == {0.0}


@given(runs(st.sampled_from(["crash", "node"])), CONFIGS)
def test_a_run_that_saves_nothing_ends_after_its_budget(
    faults: list[Fault], config: ClusterConfig
) -> None:
    config = replace(config, max_failures_in_place=0)
    still = [replace(fault, saves=0) for fault in faults * 8]
    made = decisions(still, config)
    if len(still) > config.max_failures:
        assert len(made) == config.max_failures + 1
        assert made[-1].action == "stop"
        assert f"cluster.max_failures={config.max_failures}" in made[-1].reason


@given(runs(), CONFIGS)
def test_waits_grow_while_nothing_is_saved_and_are_bounded(
    faults: list[Fault], config: ClusterConfig
) -> None:
    config = replace(config, max_failures_in_place=0)
    crashes = [replace(fault, saves=0, kind="crash") for fault in faults]
    waits = [made.wait_s for made in decisions(crashes, config) if made.action == "retry"]
    assert waits == sorted(waits)
    assert waits[:1] in ([], [0.0])
    assert all(0 <= made.wait_s <= 300 for made in decisions(faults, config))


@given(runs(), CONFIGS)
def test_starts_that_fail_and_announced_losses_cost_no_failure(
    faults: list[Fault], config: ClusterConfig
) -> None:
    """A history with them spends as much as the same one without."""
    spent = History()
    spent_without = History()
    for fault in faults:
        spent, _ = decide(spent, fault, config)
        if fault.kind in ("crash", "node"):
            spent_without, _ = decide(spent_without, fault, config)
            assert spent.failures == spent_without.failures


@given(st.lists(st.floats(0, 100), min_size=1, max_size=30), CONFIGS)
def test_failed_starts_end_a_run_by_time_and_not_by_number(
    gaps: list[float], config: ClusterConfig
) -> None:
    at_s, faults = 0.0, []
    for gap in gaps:
        at_s += gap
        faults.append(Fault(kind="start", at_s=at_s))
    made = decisions(faults, config)
    within = [fault for fault in faults if fault.at_s - faults[0].at_s < config.room_timeout_s]
    assert [one.action for one in made[: len(within)]] == ["retry"] * len(within)
    assert (made[-1].action == "stop") == (len(within) < len(faults))


@given(
    st.integers(1, 5),
    st.lists(st.sampled_from(["start", "preemption", "node"]), max_size=3),
    st.integers(0, 10**9),
)
def test_the_same_place_again_and_again_is_the_runs_fault(
    limit: int, between: list[str], images: int
) -> None:
    """Whatever happens between, and however many failures are allowed."""
    config = ClusterConfig(max_failures=10**6, max_failures_in_place=limit)
    crash = Fault(kind="crash", at_s=0, images=images)
    others = [replace(crash, kind=kind) for kind in between]  # type: ignore[arg-type]
    made = decisions([crash, *others] * (limit + 1), config)
    assert len(made) == 1 + (limit - 1) * (1 + len(others))
    assert made[-1].action == "stop"
    assert f"{images:,} images" in made[-1].reason
    elsewhere = [replace(crash, images=images + index % 2) for index in range(20)]
    if limit > 1:
        assert {one.action for one in decisions(elsewhere, config)} == {"retry"}


@given(st.lists(st.integers(0, 64), min_size=3, max_size=3), st.integers(65, 10**6))
def test_the_same_place_is_known_however_it_is_told_but_not_after_a_new_checkpoint(
    told: list[int], far: int
) -> None:
    config = ClusterConfig(max_failures=10**6, max_failures_in_place=3)
    crash = Fault(kind="crash", at_s=0, blur_images=64)
    near = [replace(crash, images=10**6 + more) for more in told]
    assert [one.action for one in decisions(near, config)] == ["retry", "retry", "stop"]
    away = [replace(crash, images=index * far) for index in range(9)]
    assert {one.action for one in decisions(away, config)} == {"retry"}
    saving = [replace(one, saves=index) for index, one in enumerate(near)]
    assert {one.action for one in decisions(saving, config)} == {"retry"}


@given(CONFIGS)
def test_announced_losses_have_a_budget_of_their_own(config: ClusterConfig) -> None:
    leave = Fault(kind="preemption", at_s=0)
    made = decisions([leave] * 100, config)
    assert len(made) == config.max_preemptions + 1
    assert "cluster.max_preemptions" in made[-1].reason
    saving = [replace(leave, saves=index) for index in range(100)]
    if config.max_preemptions > 0:
        assert len(decisions(saving, config)) == 100


@given(
    st.sets(st.integers(1, 64), min_size=1),
    st.data(),
    st.floats(0, 100),
    st.floats(0, 100),
)
def test_as_many_workers_start_as_there_is_room_for_and_no_start_waits_for_ever(
    allowed: set[int], data: st.DataObject, waited_s: float, patience_s: float
) -> None:
    fitting = data.draw(st.sets(st.sampled_from(sorted(allowed))))
    wanted = data.draw(st.sampled_from(sorted(allowed)))
    chosen = choose_workers(
        sorted(allowed), fitting, wanted=wanted, waited_s=waited_s, patience_s=patience_s
    )
    if not fitting:
        assert chosen is None
    elif waited_s >= patience_s or max(fitting) >= wanted:
        assert chosen == max(fitting)
    else:
        assert chosen is None


@given(
    st.lists(st.sampled_from(["a", "b", "c", None]), max_size=12),
    st.lists(st.sampled_from(["crash", "node", "start"]), min_size=12, max_size=12),
    st.integers(0, 4),
)
def test_a_node_is_avoided_after_so_many_failures_in_a_row_there(
    nodes: list[str | None], kinds: list[str], limit: int
) -> None:
    """In a row: among those of which the node is known, and none of another came between.

    A start that its workers do not come to is one of them.
    """
    config = ClusterConfig(max_failures=100, max_failures_in_place=0, max_failures_of_node=limit)
    history, avoided = History(), set()
    for index, node in enumerate(nodes):
        fault = Fault(kind=kinds[index], at_s=0, node=node)  # type: ignore[arg-type]
        history, decision = decide(history, fault, config)
        known = [one for one in nodes[: index + 1] if one is not None]
        row = known[-limit:] if limit else []
        is_bad = node is not None and row == [node] * limit and limit > 0
        assert decision.avoids == (node if is_bad and node not in avoided else None)
        if is_bad:
            avoided.add(node)
        assert history.avoided == avoided
    assert readmit(history).avoided == frozenset()


@given(runs(st.sampled_from(["preemption", "resize"])), CONFIGS)
def test_no_node_is_blamed_for_what_is_no_failure(
    faults: list[Fault], config: ClusterConfig
) -> None:
    assert {made.avoids for made in decisions(faults, config)} == {None}


@given(
    st.sets(st.integers(1, 9)),
    st.sets(st.integers(1, 9)),
    st.floats(0, 100),
    st.floats(0, 100),
)
def test_nodes_that_are_avoided_are_used_where_others_do_not_suffice(
    fitting: set[int], ever: set[int], waited_s: float, patience_s: float
) -> None:
    must = must_readmit(fitting, ever, waited_s=waited_s, patience_s=patience_s)
    if fitting:
        assert not must
    elif not ever or waited_s >= patience_s:
        assert must
    else:
        assert not must


@given(runs(), CONFIGS, st.integers(0, 6), st.integers(0, 6))
def test_workers_that_came_and_made_no_update_are_sent_away_and_charged_to_nothing(
    faults: list[Fault], config: ClusterConfig, workers: int, proven: int
) -> None:
    """At once, whatever is spent and however they failed; those that are known to train stay."""
    history = History()
    for fault in faults:
        grown = replace(fault, workers=workers, proven=proven)
        announced = fault.kind == "preemption"
        after, decision = decide(history, grown, config)
        plain, usual = decide(history, fault, config)
        if workers > proven > 0 and fault.images is None and not announced:
            assert (decision.action, decision.wait_s, decision.most) == ("retry", 0.0, proven)
            assert f"no update was made with {workers} workers" in decision.reason
            assert after.failures <= history.failures
            assert after.preemptions <= history.preemptions
            assert (after.avoided, after.starts) == (history.avoided, 0)
        else:
            assert (after, decision) == (plain, usual)
            assert decision.most is None
        history = plain  # as if the same had come to a run that spends
