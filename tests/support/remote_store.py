"""A run's checkpoints in a real S3 bucket, behind a proxy that fails on command."""

from __future__ import annotations

import os
import signal
import socket
import threading
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import pytest

from tests.support.faulty_proxy import FaultyProxy, faulty_proxy
from tests.support.s3_server import S3Server
from tests.unit.trainer.checkpoint.worlds import (
    RUN,
    SCIENCE,
    SHAPES,
    Savings,
    State,
    ThreadRanks,
    empty_state,
    on_ranks,
    split,
)
from trainer.checkpoint.errors import DamagedCheckpoint
from trainer.checkpoint.index import CheckpointIndex
from trainer.checkpoint.reader import CheckpointReader
from trainer.storage.open import open_store
from trainer.storage.store import Store, StoreConfig

Moment = Literal["unsent", "half sent"]
_METHODS = (b"GET ", b"PUT ", b"POST ", b"DELETE ", b"HEAD ")


@dataclass(frozen=True)
class RemoteStore:
    """A bucket of its own, and two ways to it.

    Attributes:
        server: The real store.
        proxy: What stands before it.
        bucket: Name of the bucket.
    """

    server: S3Server
    proxy: FaultyProxy
    bucket: str

    @property
    def uri(self) -> str:
        """The place of the runs."""
        return f"s3://{self.bucket}/runs"

    def config(self, **changes: Any) -> StoreConfig:
        """How to reach it through the proxy, with the patience of a test."""
        settings = {"retries": 1, "connect_timeout_s": 1.0, "read_timeout_s": 5.0, **changes}
        return StoreConfig(endpoint_url=self.proxy.endpoint_url, **settings)

    def open(self, **changes: Any) -> Store:
        """The store through the proxy."""
        return open_store(self.uri, self.config(**changes))

    def direct(self) -> Store:
        """The store past the proxy, with connections of its own, which a fork must not share."""
        return open_store(self.uri, StoreConfig(endpoint_url=self.server.endpoint_url))

    @cached_property
    def store(self) -> Store:
        """The store past the proxy, for this process."""
        return self.direct()

    def empty(self) -> None:
        """Have everything as it was in the beginning."""
        self.proxy.heal()
        for key in self.store.list(""):
            self.store.delete(key)
        self.store.abort_unfinished("", lambda key: True)

    def unfinished(self) -> list[str]:
        """The keys of uploads in parts that were begun and not ended."""
        answer = self.server.client.list_multipart_uploads(Bucket=self.bucket)
        return [upload["Key"].removeprefix("runs/") for upload in answer.get("Uploads", ())]


@contextmanager
def remote_store(server: S3Server) -> Iterator[RemoteStore]:
    """Make a bucket and a proxy, and have boto3 find the credentials, until the block ends."""
    with faulty_proxy(server.endpoint_url) as proxy, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        bucket = server.make_bucket(f"faults-{uuid.uuid4().hex[:12]}").removeprefix("s3://")
        yield RemoteStore(server, proxy, bucket)


def save_state(
    store: Store,
    state: State,
    *,
    images: int,
    cuts: Sequence[int] = (),
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    science: Mapping[str, Any] = SCIENCE,
    **changes: Any,
) -> list[str | BaseException]:
    """Save by a rank for each piece; the train state holds `images`.

    Returns:
        Of each rank the checkpoint's address, or what it ended with.
    """
    fragments = split(state, cuts, shapes)

    def act(rank: int, ranks: ThreadRanks) -> str:
        savings = Savings(store, ranks=ranks, **changes)
        return savings.save(
            images=images, fragments=fragments[rank], train_state={"images": images}, **science
        )

    return on_ranks(len(fragments), act)


def load_state(
    store: Store,
    *,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    report: Callable[[str], object] = lambda damage: None,
) -> tuple[int, State, CheckpointIndex] | None:
    """What one process that starts on the store resumes from, past what is damaged.

    Args:
        store: The store.
        shapes: Shapes of the parameters.
        report: Takes what reading showed to be damaged.

    Returns:
        Images, state, and the process's view of the checkpoints.
    """
    state = empty_state(shapes)
    reader = CheckpointReader(store, run=RUN)
    while (manifest := reader.newest_valid()) is not None:
        try:
            counters = reader.restore(manifest, split(state, [], shapes)[0])
        except DamagedCheckpoint as damage:
            report(str(damage))
            continue
        return counters["images"], state, reader.index
    return None


def in_forks(*acts: Callable[[], object]) -> list[int]:
    """Run things in copies of this process, at the same time.

    Returns:
        The exit code of each: 0, 1 after an exception, or the negative number of a signal.
    """
    process_ids = [_forked(act) for act in acts]
    statuses = [os.waitpid(process_id, 0)[1] for process_id in process_ids]
    return [os.waitstatus_to_exitcode(status) for status in statuses]


def _forked(act: Callable[[], object]) -> int:
    with warnings.catch_warnings():
        # Swift brings eventlet along, which warns of forks though nothing here uses it.
        warnings.simplefilter("ignore", DeprecationWarning)
        process_id = os.fork()
    if process_id:
        return process_id
    code = 1
    try:
        act()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def die_at_request(number: int, moment: Moment) -> None:
    """Have this process killed at its n-th HTTP request from now, counted from 1.

    Args:
        number: Which request, of all threads.
        moment: Before anything of it is sent, or after half of its body is; without a body, after
            it is sent and before its answer is read.
    """
    counted = 0
    lock = threading.Lock()
    mine = threading.local()
    sendall = socket.socket.sendall

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def watched(self: socket.socket, data: Any, *flags: int) -> None:
        nonlocal counted
        if bytes(data[:7]).startswith(_METHODS):
            with lock:
                counted += 1
                mine.is_it = counted == number
            mine.half = _content_length(bytes(data)) // 2
            if mine.is_it and moment == "unsent":
                die()
            sendall(self, data, *flags)
            if mine.is_it and not mine.half:
                die()
            return
        if getattr(mine, "is_it", False):
            sendall(self, data[: mine.half])
            mine.half -= len(data[: mine.half])
            if not mine.half:
                die()
            return
        sendall(self, data, *flags)

    socket.socket.sendall = watched  # type: ignore[method-assign,assignment]


def _content_length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.partition(b":")[2])
    return 0
