"""A save, a restore, and the deletion of a checkpoint, by ranks that are played."""

import math
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoints.state import KINDS, RUN
from benchmarks.command import Cell
from benchmarks.ranks.played import PlayedGroup, PlayedRanks, Traffic, play
from trainer.checkpoint import layout
from trainer.checkpoint.config import CheckpointConfig
from trainer.checkpoint.index import CheckpointIndex
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.saver import CheckpointSaver
from trainer.checkpoint.upload import SaveReport
from trainer.state import Fragment
from trainer.storage.local import LocalStore
from trainer.storage.open import open_store
from trainer.storage.store import StoreConfig

_MEMORY = Path("/dev/shm")
_IMAGES = 64


class CountedStore(LocalStore):
    """A folder whose requests are counted.

    Attributes:
        requests: By kind.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.requests: Counter[str] = Counter()
        self._counting = threading.Lock()

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Count it and do it."""
        self._count("put")
        super().put(key, data)

    def create(self, key: str, data: bytes) -> bool:
        """Count it and do it."""
        self._count("put")
        return super().create(key, data)

    def get(self, key: str) -> bytes:
        """Count it and do it."""
        self._count("get")
        return super().get(key)

    def get_range(self, key: str, start: int, size: int) -> bytes:
        """Count it and do it."""
        self._count("get")
        return super().get_range(key, start, size)

    def list(self, prefix: str) -> dict[str, int]:
        """Count it and do it."""
        self._count("list")
        return super().list(prefix)

    def delete_all(self, keys: Collection[str]) -> None:
        """Count it and do it."""
        self._count("delete")
        super().delete_all(keys)

    def _count(self, kind: str) -> None:
        with self._counting:
            self.requests[kind] += 1


def measure_checkpoints(shapes: Mapping[str, tuple[int, ...]], ranks: int) -> list[dict[str, Cell]]:
    """Save and restore a model cut as ZeRO-3 cuts it; the rows of the table.

    The seconds are the first rank's own work, in both of its threads; the others do theirs beside.
    """
    with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.exists() else None) as folder:
        store = CountedStore(Path(folder))
        saving, restoring = PlayedGroup(ranks), PlayedGroup(ranks)
        saved_s = play(saving, partial(_save, store, shapes))[0]
        save = _row("save", ranks, saving.traffic, saved_s, store.requests)
        store.requests = Counter()
        restored_s = play(restoring, partial(_restore, store, shapes))[0]
        restore = _row("restore", ranks, restoring.traffic, restored_s, store.requests)
        size = len(store.get(layout.manifest_key(RUN, _IMAGES)))
    manifest: dict[str, Cell] = {
        "what": "manifest",
        "ranks": ranks,
        "messages": 1,
        "KiB": size / 1024,
    }
    return [save, restore, manifest]


def _row(
    what: str, ranks: int, traffic: Traffic, seconds: float, requests: Counter[str]
) -> dict[str, Cell]:
    return {
        "what": what,
        "ranks": ranks,
        "messages": traffic.messages,
        "KiB": traffic.bytes / 1024,
        "to the first": traffic.first_messages,
        "its KiB": traffic.first_bytes / 1024,
        "requests": sum(requests.values()),
        "s": seconds,
    }


def _save(store: CountedStore, shapes: Mapping[str, tuple[int, ...]], ranks: PlayedRanks) -> float:
    reports: list[tuple[SaveReport, float]] = []
    began_s = time.thread_time()
    saver = CheckpointSaver(
        store,
        index=CheckpointIndex(store, run=RUN),
        config=CheckpointConfig(keep_last=1, patience_s=0.0),
        ranks=ranks,  # type: ignore[arg-type]
        aside=ranks.aside,  # type: ignore[arg-type]
        report=lambda report: reports.append((report, time.thread_time())),
    )
    saver.save(
        images=_IMAGES,
        fragments=_fragments(shapes, ranks),
        train_state={},
        science={},
        config_fingerprint="",
    )
    own_s = time.thread_time() - began_s
    saver.finish()
    if ranks.rank > 0:
        return 0.0
    (report, upload_s), *_ = reports
    if report.error is not None:
        raise RuntimeError(f"nothing was measured: {report.error}")
    return own_s + upload_s


def _restore(
    store: CountedStore, shapes: Mapping[str, tuple[int, ...]], ranks: PlayedRanks
) -> float:
    began_s = time.thread_time()
    reader = CheckpointReader(store, run=RUN, ranks=ranks)  # type: ignore[arg-type]
    manifest = reader.newest_valid()
    assert manifest is not None
    fragments = _fragments(shapes, ranks)
    reader.restore(manifest, fragments)
    assert all(bool((each.tensors[KINDS[0]] == 1).all()) for each in fragments)
    return time.thread_time() - began_s


def _fragments(shapes: Mapping[str, tuple[int, ...]], ranks: PlayedRanks) -> list[Fragment]:
    fragments = []
    for name, shape in shapes.items():
        whole = math.prod(shape)
        part = -(-whole // ranks.world_size)
        start = ranks.rank * part
        if start < whole:
            numel = min(part, whole - start)
            tensors = {kind: torch.ones(numel) for kind in KINDS}
            fragments.append(Fragment(name=name, start=start, shape=shape, tensors=tensors))
    return fragments


def measure_deletes(ranks: int) -> dict[str, Cell]:
    """Delete the objects of a checkpoint by so many ranks from an S3 store; the row of the table.

    A server on loopback answers that all of them are gone, and counts.
    """
    sizes: list[int] = []
    with _server(sizes) as address:
        store = open_store(
            "s3://benchmark", StoreConfig(endpoint_url=address, anonymous=True, region="here")
        )
        keys = [layout.object_key(RUN, _IMAGES, "0123456789ab", rank) for rank in range(ranks)]
        began = time.perf_counter()
        store.delete_all(keys)
        seconds = time.perf_counter() - began
    return {
        "what": "deletes",
        "ranks": ranks,
        "messages": len(sizes),
        "KiB": sum(sizes) / 1024,
        "requests": len(sizes),
        "s": seconds,
    }


@contextmanager
def _server(sizes: list[int]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            size = int(self.headers["Content-Length"])
            self.rfile.read(size)
            sizes.append(size)
            answer = b"<DeleteResult/>"
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
