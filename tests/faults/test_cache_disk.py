"""A node's disk is full: a mistake before training, and reason for another try once it went."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from cluster.contract import WorkerContext
from cluster.failure import WorkerFailed, WorkerRefused
from cluster.launcher import run
from pipelines.ingest.digits import ensure_digits
from tests.support.worker_runs import TINY
from trainer.config import paths
from trainer.config.composition import compose_job
from trainer.config.reading import to_dict
from trainer.storage.lease import hold_lease
from trainer.storage.local import LocalStore
from trainer.training import worker

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("forked_ranks"),
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root"),
]


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    (folder := tmp_path / "disk").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "disk", folder], check=True)
    try:
        with pytest.raises(OSError, match="No space left"):
            (folder / "other").write_bytes(bytes(2**20))
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def train_again(context: WorkerContext, payload: Mapping[str, Any]) -> None:
    worker.train_worker(replace(context, attempt=payload["attempt"]), payload["job"])


@pytest.mark.parametrize("attempt", [0, 1])
def test_a_full_disk_is_refused_at_first_and_fails_later(
    tmp_path: Path, full_disk: Path, attempt: int
) -> None:
    ensure_digits(f"{tmp_path}/digits")
    data = (f"data.prefix=file://{tmp_path}/digits", f"shards.cache_dir={full_disk}")
    job = compose_job([*TINY, *data, f"home={tmp_path}", "cluster.workers=1"])
    store = LocalStore(Path(paths.runs_uri(job)))
    with hold_lease(store, job.run, report=print, on_lost=print) as lease:
        launch = {"job": to_dict(job), "lease": asdict(lease), "tracker_file": None}
        with pytest.raises(WorkerFailed, match=r"cannot be (written|copied).* Free some") as failed:
            run(
                job.cluster,
                train_again,
                {"job": launch, "attempt": attempt},
                on_message=lambda _: None,
                stop=threading.Event(),
            )
    # What is refused ends a run on Ray, what fails is tried again.
    assert isinstance(failed.value, WorkerRefused) == (attempt == 0)
