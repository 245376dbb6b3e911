"""What another user of the machine can reach of a run: nothing that its ranks say or believe."""

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from cluster.contract import ClusterConfig
from cluster.failure import WorkerFailed
from cluster.launcher import run
from tests.support import foreign_peer, gather_worker

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_ranks")]


def on_ranks(
    worker: Any,
    payload: dict[str, Any],
    hear: Callable[[dict[str, Any]], None],
    **settings: Any,
) -> None:
    config = ClusterConfig(backend="local", workers=2, gpus_per_worker=0, **settings)
    run(config, worker, payload, on_message=hear, stop=threading.Event())


def test_who_takes_a_ranks_place_hears_nothing_and_is_told_of():
    with (
        foreign_peer.intruder() as intruder,
        pytest.raises(WorkerFailed, match=r"some other program connected to a port of the run"),
    ):
        # So many that it comes first at one of them, whatever else this machine does.
        on_ranks(
            foreign_peer.speak_in_groups,
            {"groups": 100},
            lambda told: intruder.aim_at(told["pid"]),
            start_timeout_s=20,
        )
    assert any(intruder.heard), "a rank believed it, else this proves nothing"
    assert not any(foreign_peer.SECRET_WORDS[:16] in told for told in intruder.heard)


def test_a_rank_without_the_secret_is_refused():
    with pytest.raises(
        WorkerFailed, match=r"in place of rank . .* does not know this run's secret"
    ):
        on_ranks(gather_worker.stranger, {}, print)


def test_another_user_cannot_touch_what_the_ranks_meet_by(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    tmp_path.chmod(0o755)
    open_to_all = tmp_path / "scratch"
    open_to_all.mkdir(mode=0o777)
    open_to_all.chmod(0o1777)  # as /tmp is

    said: list[dict[str, Any]] = []
    scratch = str(open_to_all)
    on_ranks(foreign_peer.tell_of_files, {"scratch": scratch}, said.append, scratch_dir=scratch)
    (told,) = said
    assert len(told["refused"]) == 1
    for refused in told["refused"].values():
        assert refused == [True] * len(foreign_peer.DEEDS)
