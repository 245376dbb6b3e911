"""One rank of a job that torchrun starts, without a driver: what a start is compared with."""

import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from cluster.contract import WorkerContext
from trainer.config import paths
from trainer.config.composition import compose_job
from trainer.config.job import JobConfig
from trainer.config.reading import to_dict
from trainer.metrics.mlflow_backend import file_number
from trainer.storage.lease import Lease, hold_lease
from trainer.storage.open import open_store
from trainer.training.preflight import preflight
from trainer.training.worker import train_worker

_LIMIT = timedelta(minutes=5)


def main(arguments: Sequence[str]) -> int:
    """Train this rank's part of the job whose settings are the arguments, until it has begun."""
    job = compose_job(list(arguments))
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.environ["DS_ACCELERATOR"] = "cpu"
    dist.init_process_group("gloo", timeout=_LIMIT)
    if rank > 0:
        _train(job, rank, world_size, None)
        return 0
    preflight(job, report=_say)
    store = open_store(paths.runs_uri(job), job.store)
    with hold_lease(store, job.run, report=_say, on_lost=lambda lost: _say(str(lost))) as lease:
        _train(job, rank, world_size, lease)
    return 0


def _train(job: JobConfig, rank: int, world_size: int, lease: Lease | None) -> None:
    """Run the worker's page; the first rank gives its lease to the others."""
    held: list[Any] = [None if lease is None else asdict(lease)]
    dist.broadcast_object_list(held)
    begun = threading.Event()
    context = WorkerContext(
        rank=rank,
        world_size=world_size,
        local_rank=int(os.environ["LOCAL_RANK"]),
        local_world_size=int(os.environ["LOCAL_WORLD_SIZE"]),
        attempt=0,
        device="cpu",
        stop_requested=begun.is_set,
        report=lambda message: None,
        log=lambda level, text: _say(text),
        advance=lambda images: begun.set(),
    )
    payload = {
        "job": to_dict(job),
        "lease": held[0],
        "tracker_file": file_number(job.tracking, str(paths.home(job))),
    }
    train_worker(context, payload)


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
