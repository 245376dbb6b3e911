"""A program of another user of this machine that wants to become a rank of a run."""

from __future__ import annotations

import multiprocessing
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

from cluster.contract import WorkerContext
from trainer.host_group import HostGroup

NOBODY = 65534
SECRET_WORDS = b"what only ranks of the run may read " * 8


def speak_in_groups(context: WorkerContext, payload: dict[str, int]) -> None:
    """Form groups, of which the first rank tells the others something in each."""
    context.report({"pid": os.getpid()})
    for number in range(payload["groups"]):
        if number % 2 == context.rank:
            time.sleep(0.3)  # the other waits at its port, where somebody else may come first
        heard = HostGroup().broadcast(SECRET_WORDS if context.rank == 0 else b"", source=0)
        assert heard == SECRET_WORDS
    context.report({"rank": context.rank})


class Intruder:
    """The other user's program.

    It keeps to the ports of the processes that it is shown: others on this machine have nothing to
    do with it.

    Attributes:
        heard: What came in over each connection that a port of theirs took; there once the block
            has ended.
    """

    heard: list[bytes]

    def __init__(self, channel: Connection) -> None:
        self._channel = channel
        self._known: dict[int, set[int]] = {}
        self.over = threading.Event()

    def aim_at(self, pid: int) -> None:
        """Connect to each port that a process opens from now on."""
        self._known[pid] = _listening(pid)

    def look(self) -> None:
        """Look for new ports until it is over."""
        while not self.over.is_set():
            for pid, known in list(self._known.items()):
                for port in _listening(pid) - known:
                    known.add(port)
                    self._channel.send(port)


@contextmanager
def intruder() -> Iterator[Intruder]:
    """Connect to the ports of processes during the block, as gloo's ranks do.

    The program is another user's if this one may become another.
    """
    # Without exec: another user may not be able to read this interpreter.
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_intrude, args=(theirs,))
    process.start()
    result = Intruder(ours)
    looking = threading.Thread(target=result.look)
    try:
        looking.start()
        yield result
        result.over.set()
        looking.join()
        ours.send(None)
        result.heard = ours.recv()
    finally:
        result.over.set()
        looking.join()
        process.kill()
        process.join()


def tell_of_files(context: WorkerContext, payload: dict[str, str]) -> None:
    """Tell which files the run keeps under its scratch folder, and what of them nobody may do."""
    if context.rank > 0:
        return
    files = [path for path in Path(payload["scratch"]).rglob("*") if path.is_file()]
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    if (child := os.fork()) == 0:
        _become_nobody()
        theirs.send({str(file): [_refused(deed, file) for deed in DEEDS] for file in files})
        os._exit(0)
    context.report({"refused": ours.recv()})
    os.waitpid(child, 0)


DEEDS: Sequence[Callable[[Path], object]] = (
    lambda file: file.read_bytes(),
    lambda file: file.open("ab").close(),
    lambda file: (file.parent / "another").touch(),
    lambda file: file.unlink(),
    lambda file: file.parent.rename(file.parent.with_name("elsewhere")),
)
"""What another user would do to a file that ranks meet by."""


def _refused(deed: Callable[[Path], object], file: Path) -> bool:
    try:
        deed(file)
    except PermissionError:
        return True
    return False


def _become_nobody() -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def _intrude(channel: Connection) -> None:
    if os.geteuid() == 0:
        _become_nobody()
    held: list[socket.socket] = []
    while (port := channel.recv()) is not None:
        # The n-th connection that a rank waits for begins with this number.
        for number in range(3):
            with suppress(OSError):
                connection = socket.socket()
                connection.settimeout(1)
                connection.connect(("127.0.0.1", port))
                connection.sendall(struct.pack("=q", number))
                held.append(connection)
    channel.send([_heard(connection) for connection in held])


def _heard(connection: socket.socket) -> bytes:
    connection.setblocking(False)
    told = b""
    with suppress(OSError):
        while part := connection.recv(1 << 16):
            told += part
    return told


def _listening(pid: int) -> set[int]:
    """Ports on which a process listens; none once it has ended."""
    with suppress(psutil.Error):
        connections = psutil.Process(pid).net_connections("tcp")
        return {each.laddr.port for each in connections if each.status == psutil.CONN_LISTEN}
    return set()
