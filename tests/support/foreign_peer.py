"""A program of another user of this machine that wants to become a rank of a run."""

from __future__ import annotations

import multiprocessing
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path

from cluster.contract import WorkerContext
from trainer.host_group import HostGroup

NOBODY = 65534
SECRET_WORDS = b"what only ranks of the run may read " * 8


def speak_in_groups(context: WorkerContext, payload: dict[str, int]) -> None:
    """Form groups, of which the first rank tells the others something in each."""
    for _ in range(payload["groups"]):
        heard = HostGroup().broadcast(SECRET_WORDS if context.rank == 0 else b"", source=0)
        assert heard == SECRET_WORDS
    context.tell({"rank": context.rank})


class Intruder:
    """What the other user's program got hold of, once the block has ended.

    Attributes:
        heard: What came in over each connection that a port of the run took.
    """

    heard: list[bytes]


@contextmanager
def intruder() -> Iterator[Intruder]:
    """Connect to every port that is opened on this machine during the block, as gloo's ranks do.

    The program is another user's if this one may become another.
    """
    # Without exec: another user may not be able to read this interpreter.
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_intrude, args=(theirs,))
    process.start()
    result = Intruder()
    try:
        assert ours.recv() == "ready"
        yield result
        ours.send("enough")
        result.heard = ours.recv()
    finally:
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
    context.tell({"refused": ours.recv()})
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
    known = _listening()
    held: list[socket.socket] = []
    channel.send("ready")
    while not channel.poll():
        for port in _listening() - known:
            known.add(port)
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


def _listening() -> set[int]:
    """Ports on which somebody listens on the loopback address."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    entries = [line.split() for line in lines]
    return {
        int(address.rpartition(":")[2], 16)
        for _, address, _, state, *_ in entries
        if state == "0A" and address.startswith("0100007F:")
    }
