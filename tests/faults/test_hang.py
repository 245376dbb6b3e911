"""A rank of a real job stands still: its peers notice, tell where they stand, and it goes on."""

from __future__ import annotations

import re
import shutil
import signal
from pathlib import Path

import pytest

from tests.support.job import SMALL, job
from trainer.storage.local import LocalStore
from trainer.training.goodput import read_launches, total_time

pytestmark = pytest.mark.slow


def test_a_stopped_rank_is_noticed_by_its_peer_and_the_run_goes_to_its_end(
    empty_tracker: Path, tmp_path: Path
) -> None:
    shutil.copy(empty_tracker, tmp_path)
    settings = (
        "runtime.hang_s=4",
        "shards.download_patience_s=1",
        "shards.download_timeout_s=1",
        "eval.classifier=false",
    )
    with job(*SMALL, *settings, home=tmp_path) as stopped:
        stopped.wait_for("the hang watchdog is armed: after 8 s without an update")
        stopped.wait_for(r"checkpoint: \S+")
        victim = stopped.workers()[0]
        victim.send_signal(signal.SIGSTOP)
        told = stopped.wait_for(r"warning: worker (\d): no update for \d+ s .*it stands in (.*);")
        stopped.wait_for(r"resumed after [\d,]+ images")
        assert stopped.wait() == 0, stopped.output
        assert not victim.is_running()
    rank, place = told.groups()
    # It waits for the stopped one in a collective call, or for that of the vote.
    assert re.match(r"\w+ \((distributed_c10d|loop)\.py:\d+\)", place), place
    store = LocalStore(tmp_path / "store/runs")
    (key,) = store.list("digits/hangs/")
    assert key.endswith(f"/rank-{int(rank):05d}.txt")
    stacks = store.get(key).decode()
    assert "in train_worker" in stacks
    assert "watchdog" in stacks
    assert re.search(
        rf"attempt 0: worker {rank} on \S+ stood still, .*, and ended itself with exit code 75",
        stopped.output,
    )
    lost = {key.rpartition("/")[2]: store.get(key).decode() for key in store.list("digits/lost/")}
    assert "ERROR: no update for" in lost[f"rank-{int(rank):05d}.txt"]
    (launch,) = read_launches(store, "digits")
    assert len(launch.attempts) == 2
    assert total_time([launch])["restart"] > 8
