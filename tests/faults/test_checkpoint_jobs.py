"""Whole jobs whose store fails: training goes on, the exit code tells, and the run is continued.

The first one is a process as users start it. The others run the command in this process, on workers
that are forks, and save the imports.
"""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import threading
import time
from pathlib import Path

import pytest

from tests.support.faulty_proxy import Request
from tests.support.http_faults import Answer
from tests.support.job import SMALL, job
from tests.support.remote_store import RemoteStore
from trainer.checkpoint.content import ReadProgress, damaged_objects
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.reader import CheckpointReader
from trainer.cli.launch import main

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_ranks")]

UNSAVED = 3


@pytest.fixture
def home(empty_tracker: Path, tmp_path: Path) -> Path:
    (tmp_path / "mlflow.db").write_bytes(empty_tracker.read_bytes())
    return tmp_path


def settings(remote: RemoteStore, *changes: str) -> list[str]:
    """A job of one plain process whose store is behind the proxy."""
    return [
        *(setting for setting in SMALL if not setting.startswith("cluster.")),
        *("cluster.backend=local", "cluster.workers=1"),
        f"store.uri=s3://{remote.bucket}",
        f"store.endpoint_url={remote.proxy.endpoint_url}",
        *("store.retries=1", "store.connect_timeout_s=1", "checkpoint.patience_s=1"),
        *changes,
    ]


def newest(remote: RemoteStore) -> Manifest:
    """The newest checkpoint, every byte of which is as it was saved."""
    manifest = CheckpointReader(remote.store, run="digits").newest_valid()
    assert manifest
    progress = ReadProgress(1, report=lambda line: None)
    assert damaged_objects(remote.store, manifest, progress) == {}
    return manifest


class FirstSight:
    """Tells when something is first asked for, from when on it counts as struck."""

    def __init__(self, pattern: str, *, delay_s: float = 0.0) -> None:
        self.seen = threading.Event()
        self._pattern = re.compile(pattern)
        self._delay_s = delay_s

    def strikes(self, request: Request) -> bool:
        """Everything from the first sight on."""
        if self._pattern.search(request.path):
            self.seen.set()
        return self.seen.is_set()

    def slows(self, request: Request) -> bool:
        """Has each write of such an object wait, and lets it pass."""
        if request.method == "PUT" and self._pattern.search(request.path):
            self.seen.set()
            time.sleep(self._delay_s)  # all others wait meanwhile
        return False


def test_a_store_that_goes_and_stays_away(
    remote: RemoteStore, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    gone = FirstSight(r"checkpoints/000000002560/.*safetensors")
    remote.proxy.inject(Answer(status=503), when=gone.strikes)
    with job(*settings(remote), home=home) as running:
        assert gone.seen.wait(), running.output
        with remote.proxy.down():
            assert running.wait() == UNSAVED, running.output
        output = running.output
    assert "6,400/6,400 images (100%)" in output  # training reached its end
    uri = f"s3://{remote.bucket}/runs/digits/checkpoints"
    assert f"warning: {uri}/000000002560 could not be saved: Cannot write {uri}/" in output
    last = re.search(
        r"^error: 4 checkpoints of this launch could not be saved, the last .*$", output, re.M
    )
    assert last, output
    for part in (
        "after 6,400 images",
        f"Cannot write {uri}/000000006400/",
        f"at {remote.proxy.endpoint_url}: the service does not answer",
        "check that it runs",
    ):
        assert part in last[0]
    assert "Traceback" not in output
    with sqlite3.connect(home / "mlflow.db") as database:
        tags = dict(database.execute("SELECT key, value FROM tags"))
        failed = database.execute(
            "SELECT step, value FROM metrics WHERE key = 'speed/checkpoint_failed' ORDER BY step"
        ).fetchall()
    assert failed == [(1280, 0.0), *((images, 1.0) for images in range(2560, 6401, 1280))]
    for images in range(2560, 6401, 1280):
        assert f"Cannot write {uri}/" in tags[f"checkpoint_failed.{images:012d}"]
    assert tags["checkpoint"] == f"{uri}/000000001280"
    assert newest(remote).images == 1280

    remote.proxy.heal()
    assert main([*settings(remote), f"home={home}"]) == 0
    assert f"resumed after 1,280 images from {uri}/000000001280" in capfd.readouterr().out
    assert newest(remote).images == 6400


LONG = ("train.total_images=640000", "checkpoint.interval_images=12800")


def ask_to_stop_at(sight: FirstSight) -> None:
    """Have the command in this process asked to stop as soon as something is seen."""

    def ask() -> None:
        sight.seen.wait()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask, daemon=True).start()


def test_a_stop_during_an_upload_waits_for_a_final_checkpoint(
    remote: RemoteStore, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    slow = FirstSight(r"checkpoints/000000012800/.*safetensors", delay_s=2)
    remote.proxy.inject(Answer(), when=slow.slows)
    ask_to_stop_at(slow)
    assert main([*settings(remote, *LONG), f"home={home}"]) == 128 + signal.SIGTERM
    said = capfd.readouterr().out
    final = newest(remote).images
    assert 12800 < final < 640000
    assert re.search(r"checkpoint: \S+/000000012800\n", said)
    assert re.search(rf"stopped; .* \S+/{final:012d}\n", said)

    # The same with a grace that is too short for any save to come through.
    remote.proxy.heal()
    slow = FirstSight(r"digits/checkpoints/.*safetensors", delay_s=30)
    remote.proxy.inject(Answer(), when=slow.slows)
    ask_to_stop_at(slow)
    hasty = [*settings(remote, *LONG), "checkpoint.grace_s=1", f"home={home}"]
    assert main(hasty) == UNSAVED
    said, errors = capfd.readouterr()
    assert f"resumed after {final:,} images" in said
    assert "there was no time left to wait for the store (checkpoint.grace_s)" in errors
    assert newest(remote).images == final
