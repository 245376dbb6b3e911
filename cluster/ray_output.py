"""What workers write, carried to the driver: each byte once, also the last of one that was killed.

Ray keeps what a process writes in two files on its node. A worker follows those of its own, and
sends what is new. What it could not send before it ended is read on its node, from where it was.
"""

import os
import re
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.contract import Level, Line
from cluster.ray_mailbox import Output, Seat, Started

_LOOK_S = 0.2
"""How often a worker looks whether it has written anything."""
_CHUNK_BYTES = 1 << 16
_AT_ONCE_BYTES = 1 << 18
"""So much of a file is sent at a look; the file keeps the rest for the next one."""
_LAST_BYTES = 1 << 20
"""So much at the end of a file is read once its worker has ended."""
_LONGEST_LINE = 1 << 15
_READ_TIMEOUT_S = 20.0
"""A process has to start on the node, to read there."""
_READERS = 8
_STANDARD_ERROR = 2
_NOT_WRITTEN = "log"
"""The stream of what is logged where there is no file to follow."""
_OF_RAY = (":job_id:", ":actor_name:", ":task_name:")
"""How lines begin by which Ray says whose file it is."""
_LOGGED = re.compile(r"lapflow (INFO|WARNING|ERROR): (.*)")


def output_paths() -> tuple[str, ...]:
    """The files that take what this process writes, as far as these are files."""
    found = []
    for stream in (sys.__stdout__, sys.__stderr__):
        with suppress(OSError, ValueError, AttributeError):
            path = os.readlink(f"/proc/self/fd/{cast(Any, stream).fileno()}")
            if path.startswith("/") and Path(path).is_file():
                found.append(path)
    return tuple(dict.fromkeys(found))


class OutputTail(threading.Thread):
    """Sends the driver what this process writes.

    Args:
        send: Takes what is new, and does not wait.
        attempt: The worker's attempt.
        rank: The worker.
        paths: Its files.
    """

    def __init__(
        self, send: Callable[[Output], None], *, attempt: int, rank: int, paths: Sequence[str]
    ) -> None:
        super().__init__(name="tail", daemon=True)
        self._send = send
        self._attempt = attempt
        self._rank = rank
        self._files = {path: os.open(path, os.O_RDONLY) for path in paths}
        self._ends = dict.fromkeys((*paths, _NOT_WRITTEN), 0)
        self._lock = threading.Lock()
        self._over = threading.Event()

    def log(self, level: Level, text: str) -> None:
        """Has the driver get a line, which is in a file at once, whatever ends this process."""
        line = f"lapflow {level}: {' '.join(text.splitlines())}\n".encode(errors="replace")
        if self._files:
            # In one call, and past Python's buffer and the lock of that.
            with suppress(OSError):
                os.write(_STANDARD_ERROR, line)
            return
        with self._lock:
            self._tell(_NOT_WRITTEN, line)

    def flush(self, most_bytes: int = _AT_ONCE_BYTES) -> None:
        """Sends what is new, up to so many bytes of each file."""
        with self._lock, suppress(OSError):
            for path, file in self._files.items():
                limit = self._ends[path] + most_bytes
                while (end := self._ends[path]) < limit:
                    data = os.pread(file, min(_CHUNK_BYTES, limit - end), end)
                    if not data:
                        break
                    self._tell(path, data)

    def close(self) -> None:
        """Sends what is left, as far as the driver is to have it."""
        self._over.set()
        self.flush(_LAST_BYTES)

    def run(self) -> None:
        """The thread's work."""
        while not self._over.wait(_LOOK_S):
            with suppress(ray.exceptions.RayError):  # the driver is gone, and so is this process
                self.flush()

    def _tell(self, stream: str, data: bytes) -> None:
        start = self._ends[stream]
        self._ends[stream] += len(data)
        self._send(Output(self._attempt, self._rank, stream, start, data))


@dataclass
class _Stream:
    """How much of a file the driver has, and the beginning of a line whose end it has not."""

    end: int = 0
    rest: bytes = b""


class _Worker(NamedTuple):
    attempt: int
    rank: int


class Part(NamedTuple):
    """The part of a worker's file that the driver does not have."""

    attempt: int
    rank: int
    path: str
    start: int


class OutputLog:
    """What the driver has of its workers' lines.

    Args:
        tell: Takes each line, once.
        here: Ray's name of the driver's node.
        names_nodes: Whether lines tell the node.
    """

    def __init__(self, tell: Callable[[Line], None], *, here: str, names_nodes: bool) -> None:
        self._tell = tell
        self._here = here
        self._names_nodes = names_nodes
        self._seats: dict[_Worker, Seat] = {}
        self._streams: dict[_Worker, dict[str, _Stream]] = {}
        self._ended: set[_Worker] = set()
        self._reads: list[Future[list[Output]]] = []
        self._newest = -1
        self._has_rest = False

    def begin(self, started: Started) -> None:
        """Notes where the workers of an attempt run, and forgets those of long ago."""
        self._read_rest()
        for worker in [one for one in self._seats if one.attempt < started.attempt - 2]:
            del self._seats[worker]
            self._streams.pop(worker, None)
            self._ended.discard(worker)
        for rank, seat in enumerate(started.seats):
            self._seats[_Worker(started.attempt, rank)] = seat
        self._newest, self._has_rest = started.attempt, started.attempt > 0

    def advance(self, attempt: int) -> None:
        """An attempt has made an update: its start is hindered no more by reading behind others."""
        if attempt == self._newest:
            self._read_rest()

    def close(self, *, timeout_s: float) -> None:
        """Reads what is left of all workers, and tells it.

        Args:
            timeout_s: How long to wait for it.
        """
        self._read_rest()
        self.read(self._newest)
        wait(self._reads, timeout=timeout_s)
        self.look()
        for attempt, rank in set(self._seats) - self._ended:
            self.end(attempt, [rank])

    def _read_rest(self) -> None:
        if self._has_rest:
            self._has_rest = False
            self.read(self._newest - 1)

    def take(self, output: Output) -> None:
        """Tells the lines that are whole now, of what is new in it."""
        worker = _Worker(output.attempt, output.rank)
        if worker not in self._seats:
            return  # of long ago
        stream = self._streams.setdefault(worker, {}).setdefault(output.stream, _Stream())
        known = stream.end - output.start
        if known >= len(output.data):
            return
        if known < 0:
            self._end_line(worker, stream)
            self._tell_line(worker, f"({-known:,} bytes are left out: {output.stream})")
        stream.end = output.start + len(output.data)
        *lines, stream.rest = (stream.rest + output.data[max(known, 0) :]).split(b"\n")
        for line in lines:
            self._tell_line(worker, line.decode(errors="replace"))
        if len(stream.rest) > _LONGEST_LINE:
            self._end_line(worker, stream)

    def end(self, attempt: int, ranks: Iterable[int]) -> None:
        """All that these workers have written is there."""
        for rank in ranks:
            self._ended.add(worker := _Worker(attempt, rank))
            for stream in self._streams.get(worker, {}).values():
                self._end_line(worker, stream)

    def read(
        self, attempt: int, ranks: Collection[int] | None = None
    ) -> list[Future[list[Output]]]:
        """Reads what workers that have ended could not send, on their nodes and in threads.

        Args:
            attempt: Theirs.
            ranks: Them; None for all of the attempt whose end is not known.
        """
        parts: dict[str, list[Part]] = {}
        for worker, seat in self._seats.items():
            is_wanted = ranks is None or worker.rank in ranks
            if worker.attempt == attempt and worker not in self._ended and is_wanted:
                for path in seat.output:
                    end = self._streams.get(worker, {}).get(path, _Stream()).end
                    parts.setdefault(seat.node, []).append(Part(*worker, path, end))
        pool = ThreadPoolExecutor(_READERS, thread_name_prefix="read")
        reads = [
            pool.submit(read_parts, of_node)
            if node == self._here
            else pool.submit(_read_there, node, of_node)
            for node, of_node in parts.items()
        ]
        pool.shutdown(wait=False)
        self._reads += reads
        return reads

    def look(self) -> None:
        """Takes what has been read."""
        for reading in [reading for reading in self._reads if reading.done()]:
            self._reads.remove(reading)
            if reading.exception() is None:
                for output in reading.result():
                    self.take(output)

    def _end_line(self, worker: _Worker, stream: _Stream) -> None:
        rest, stream.rest = stream.rest, b""
        if rest:
            self._tell_line(worker, rest.decode(errors="replace"))

    def _tell_line(self, worker: _Worker, text: str) -> None:
        # Of a bar that was drawn again and again the last state counts.
        text = next((part for part in reversed(text.split("\r")) if part.strip()), "")
        if not text or text.startswith(_OF_RAY):
            return
        logged = _LOGGED.fullmatch(text)
        self._tell(
            Line(
                rank=worker.rank,
                node=self._seats[worker].address if self._names_nodes else "",
                attempt=worker.attempt,
                level=None if logged is None else cast(Level, logged[1]),
                text=text if logged is None else logged[2],
            )
        )


def read_parts(parts: Sequence[Part]) -> list[Output]:
    """The parts of files of this node, of each no more than a bounded end; nothing of lost ones."""
    found = []
    for attempt, rank, path, start in parts:
        with suppress(OSError), Path(path).open("rb") as file:
            file.seek(max(start, file.seek(0, os.SEEK_END) - _LAST_BYTES))
            begin = file.tell()
            found.append(Output(attempt, rank, path, begin, file.read(_LAST_BYTES)))
    return found


def _read_there(node: str, parts: Sequence[Part]) -> list[Output]:
    reader: Any = ray.remote(read_parts).options(
        num_cpus=0,
        max_retries=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
    )
    outputs: list[Output] = ray.get(reader.remote(parts), timeout=_READ_TIMEOUT_S)
    return outputs
