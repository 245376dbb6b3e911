"""How workers hear what the driver wants: one of each node asks, and the others read its answer.

A call of each worker to the one mailbox would be two hundred a second with a thousand workers. So
the first worker of a node asks for all of them, and writes what it heard into memory that has no
name in the file system and goes with its processes. Where it falls silent, each asks by itself.
"""

import os
import struct
import sys
import threading
import time
import zlib
from typing import Literal, NamedTuple

import ray

from cluster.failure import STOOD_STILL
from cluster.ray_mailbox import GO, HEAR_S, Mailbox, Request

_LEAVING = (
    "The driver of this run is out of reach, so this worker ends: another may take its place, and "
    "both would write."
)
_LOOK_S = 0.2
"""How often a worker looks at what the one that asks has written."""
_SILENT_S = 2 * HEAR_S
"""After how long without anything new a worker asks by itself."""
_KINDS: tuple[Literal["go", "leave", "stop"], ...] = ("go", "leave", "stop")
"""From the least to the most that the driver may want."""
_RECORD = struct.Struct("<QBd?")
_SUM = struct.Struct("<I")


class Heard(NamedTuple):
    """What the worker that asks has written.

    Attributes:
        answers: How many answers it has had.
        request: What the driver wants.
        lost: Whether the driver is out of reach.
    """

    answers: int
    request: Request
    lost: bool = False


class Board:
    """Memory that one worker of a node writes and the others read.

    Args:
        path: Where another process has it; None makes it.
    """

    def __init__(self, path: str | None = None) -> None:
        self._file = (
            os.memfd_create("lapflow-heard")
            if path is None
            else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        )
        self.is_own = path is None

    def __del__(self) -> None:
        os.close(self._file)

    @property
    def path(self) -> str:
        """Where processes of the same user and machine find it."""
        return f"/proc/{os.getpid()}/fd/{self._file}"

    def write(self, heard: Heard) -> None:
        """Writes over what was there."""
        grace_s = heard.request.grace_s
        record = _RECORD.pack(
            heard.answers,
            _KINDS.index(heard.request.kind),
            -1.0 if grace_s is None else grace_s,
            heard.lost,
        )
        os.pwrite(self._file, record + _SUM.pack(zlib.crc32(record)), 0)

    def read(self) -> Heard | None:
        """Reads what is there; None if that is nothing, or is just being written."""
        data = os.pread(self._file, _RECORD.size + _SUM.size, 0)
        record, told = data[: _RECORD.size], data[_RECORD.size :]
        if not record or told != _SUM.pack(zlib.crc32(record)):
            return None
        answers, kind, grace_s, lost = _RECORD.unpack(record)
        return Heard(answers, Request(_KINDS[kind], None if grace_s < 0 else grace_s), lost)


class Ear(threading.Thread):
    """Hears what the driver wants, and ends this process if the driver is out of reach.

    A worker that is cut off must not go on beside the one that takes its place: both would write.

    Args:
        mailbox: The line to the driver.
        attempt: The worker's attempt.
        board: Where it writes what it hears, if it is its own; where it reads that, otherwise;
            None where nobody shares it.

    Attributes:
        request: What was heard last.
    """

    def __init__(self, mailbox: Mailbox, attempt: int, board: Board | None = None) -> None:
        super().__init__(name="hear", daemon=True)
        self._mailbox = mailbox
        self._attempt = attempt
        self._board = board
        self._over = threading.Event()
        self._until_s: float | None = None
        self._answers, self._seen = 0, 0
        self._answered_s = time.monotonic()
        self._misses = 0
        self._complete = False
        self.request = GO

    def is_stop_wanted(self) -> bool:
        """Whether this worker is to return."""
        return self.request.kind != "go"

    def note_completion(self) -> None:
        """The worker came to its end, whatever it was asked for meanwhile."""
        self._complete = True

    def has_interrupted(self) -> bool:
        """Whether the worker returns before its end because all of them are to leave."""
        return self.request.kind == "leave" and not self._complete

    def grace_s(self) -> float | None:
        """How many seconds are left to return in, by what hurries most; None if nothing does."""
        return None if self._until_s is None else max(0.0, self._until_s - time.monotonic())

    def close(self) -> None:
        """Leaves the process alone from now on."""
        self._over.set()

    def run(self) -> None:
        """The thread's work."""
        while not self._over.is_set():
            self.listen()

    def listen(self) -> None:
        """Asks once, or looks once at what another has heard."""
        if self._board is None or self._board.is_own:
            self._ask()
        elif not self._look(self._board):
            self._ask()  # and looks again, for the other may only have stood still
        if self._misses > 1 and not self._over.is_set():
            self._leave()

    def _ask(self) -> None:
        try:
            heard = self._mailbox.hear(self._attempt, self.request)
        except ray.exceptions.GetTimeoutError:
            # Once more, for this process itself may have stood still that long.
            self._misses += 1
        except ray.exceptions.RayError:
            self._misses = 2
        else:
            self._take(heard)
            self._answers += 1
            self._post(lost=False)

    def _look(self, board: Board) -> bool:
        """Looks once at what another has heard; False if that has been nothing for too long."""
        heard = board.read()
        if heard is not None and heard.lost:
            self._misses = 2
            return True
        if heard is not None and heard.answers != self._seen:
            self._seen, self._answered_s = heard.answers, time.monotonic()
            self._take(heard.request)
        elif time.monotonic() - self._answered_s > _SILENT_S:
            return False
        self._over.wait(_LOOK_S)
        return True

    def _take(self, request: Request) -> None:
        self._misses = 0
        # Nobody takes back that they are to leave or to stop: what says less is an older answer,
        # of one that asks for all and stood still.
        is_older = _KINDS.index(request.kind) < _KINDS.index(self.request.kind)
        if request != self.request and not is_older:
            self.request = request
            self._hurry(request.grace_s)

    def _hurry(self, grace_s: float | None) -> None:
        # A stop that nothing hurries gives a node that is being taken away no more time.
        if grace_s is not None:
            until_s = time.monotonic() + grace_s
            self._until_s = until_s if self._until_s is None else min(self._until_s, until_s)

    def _post(self, *, lost: bool) -> None:
        if self._board is not None and self._board.is_own:
            self._board.write(Heard(self._answers, self.request, lost))

    def _leave(self) -> None:
        self._post(lost=True)
        print(_LEAVING, file=sys.stderr, flush=True)  # noqa: T201
        os._exit(STOOD_STILL)
