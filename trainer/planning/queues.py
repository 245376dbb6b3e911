"""A simulator of what a GPU does in one pass: two queues of work, and gradients on their way.

The queues share the GPU and the link between the GPUs of a node, each of which is one resource. The
GPU works for coarse scales first, as for a stream of high priority, and for the finest scale in
what time is left. What is on the link at a time shares its rate equally: an exchange, and gradients
that are reduced or weights that are gathered. That kernels of collectives take a little of the GPU
is left out.

``trainer.planning.step_time`` has a formula for the same.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from trainer.planning.streams import (
    MIX,
    MLP,
    NOTHING,
    QKV,
    Pass,
    Travel,
    backward_parts,
    without_travel,
)

GPU, LINK, NETWORK = range(3)
"""What a piece of work needs."""

Event: TypeAlias = tuple[str, int, int]
"""Something that is done: what, in which queue, and of which block."""


class Piece(NamedTuple):
    """Work of one queue that follows what is before it in its queue.

    Attributes:
        resource: What it needs.
        seconds: How long it needs it for, alone.
        start: Seconds before that, in which it needs nothing.
        needs: Events that it waits for.
        tells: The event that its end is; None is none.
    """

    resource: int
    seconds: float
    start: float = 0.0
    needs: tuple[Event, ...] = ()
    tells: Event | None = None


def simulate(work: Pass) -> tuple[float, float]:
    """Simulate one pass, block by block.

    Returns:
        Seconds of the forward pass, and of the backward pass with all of its reductions.
    """
    forward = [_forward(work, number) for number in range(len(work.streams))]
    backward = [_backward(work, number) for number in range(len(work.streams))]
    return run([*forward, _weights(work)]), run([*backward, _reductions(work)])


def run(queues: Sequence[Sequence[Piece]]) -> float:
    """Work off queues, the first of which has the GPU first; return when the last one is empty."""
    running = [_Queue(pieces) for pieces in queues]
    done: set[Event] = set()
    now = 0.0
    while True:
        known = -1
        while known < len(done):
            known = len(done)
            for queue in running:
                queue.look(done)
        links = sum(queue.resource == LINK for queue in running)
        gpu_taken = False
        going: list[tuple[_Queue, float]] = []
        for queue in running:
            rate = 1.0
            if queue.resource is None or (queue.resource == GPU and gpu_taken):
                continue
            if queue.resource == GPU:
                gpu_taken = True
            elif queue.resource == LINK:
                rate = 1 / links
            going.append((queue, rate))
        if not going:
            assert not any(queue.waits for queue in running), "queues wait for one another"
            return now
        step = min(queue.left / rate for queue, rate in going)
        now += step
        for queue, rate in going:
            queue.advance(step * rate, done)


_STARTING = -1
_NEGLIGIBLE_S = 1e-15


@dataclass(slots=True)
class _Queue:
    """What is left of a queue.

    Attributes:
        pieces: Its work.
        index: The piece that is next or under way.
        left: Seconds that are left of it, or of its start.
        resource: What is needed for that; None while it waits or when all is done.
    """

    pieces: Sequence[Piece]
    index: int = 0
    left: float = 0.0
    resource: int | None = None

    @property
    def waits(self) -> bool:
        """Whether it has work that cannot begin."""
        return self.index < len(self.pieces) and self.resource is None

    def look(self, done: set[Event]) -> None:
        """Begin the next piece if it may."""
        while self.resource is None and self.index < len(self.pieces):
            piece = self.pieces[self.index]
            if not all(event in done for event in piece.needs):
                return
            if piece.start > 0:
                self.resource, self.left = _STARTING, piece.start
            elif piece.seconds > 0:
                self.resource, self.left = piece.resource, piece.seconds
            else:
                self._end(piece, done)

    def advance(self, seconds: float, done: set[Event]) -> None:
        """Take off what was done."""
        self.left -= seconds
        if self.left > _NEGLIGIBLE_S:
            return
        piece = self.pieces[self.index]
        if self.resource == _STARTING and piece.seconds > 0:
            self.resource, self.left = piece.resource, piece.seconds
        else:
            self._end(piece, done)

    def _end(self, piece: Piece, done: set[Event]) -> None:
        if piece.tells is not None:
            done.add(piece.tells)
        self.resource = None
        self.index += 1


def _forward(work: Pass, number: int) -> list[Piece]:
    """The forward pass of a queue; the finest scale's needs keys and values of the coarse ones'."""
    stream = work.streams[number]
    pieces = [_send(stream.begin)]
    follows = number > 0
    for block in range(work.depth):
        travels = stream.forward if block else (NOTHING,) * 4
        needs = (("keys", 0, block),) if follows else ()
        held = (("weights", 0, block),) if work.weights else ()
        pieces += [
            Piece(GPU, 0.0, needs=held, tells=("begun", number, block)),
            _send(travels[0]),
            Piece(GPU, stream.compute[QKV]),
            _send(travels[1], tells=("keys", number, block)),
            Piece(GPU, stream.compute[MIX], needs=needs),
            _send(travels[2]),
            Piece(GPU, stream.compute[MLP]),
            _send(travels[3]),
        ]
    return pieces


def _backward(work: Pass, number: int) -> list[Piece]:
    """The backward pass of a queue; coarse scales need the gradient of their keys and values."""
    stream = work.streams[number]
    pieces: list[Piece] = []
    follows = number + 1 < len(work.streams)
    for block in reversed(range(work.depth)):
        before, after = (part if block else without_travel(part) for part in backward_parts(stream))
        for seconds, travel in before:
            pieces += [Piece(GPU, seconds), _send(travel)]
        pieces.append(Piece(GPU, 0.0, tells=("gradient", number, block)))
        if follows:
            pieces.append(Piece(GPU, 0.0, needs=(("gradient", number + 1, block),)))
        for seconds, travel in after:
            pieces += [Piece(GPU, seconds), _send(travel)]
        pieces.append(Piece(GPU, 0.0, tells=("done", number, block)))
    pieces.append(_send(stream.end, tells=("done", number, -1)))
    return pieces


def _weights(work: Pass) -> list[Piece]:
    """The queue of gathered weights, each of which begins when the block before it does."""
    pieces: list[Piece] = []
    for each in work.weights:
        needs = (("begun", 0, each.block - 1),) if each.block else ()
        pieces += [
            Piece(LINK, each.link, each.start, needs),
            Piece(NETWORK, each.network, tells=("weights", 0, each.block)),
        ]
    return pieces


def _reductions(work: Pass) -> list[Piece]:
    """The queue of reductions, each of which needs what all other queues made of its bucket."""
    pieces: list[Piece] = []
    for each in work.reductions:
        needs = tuple(("done", number, each.block) for number in range(len(work.streams)))
        pieces += [
            Piece(LINK, each.link, each.start, needs=needs),
            Piece(NETWORK, each.network),
        ]
    return pieces


def _send(
    travel: Travel,
    *,
    needs: Iterable[Event] = (),
    tells: Event | None = None,
) -> Piece:
    return Piece(LINK, travel.link, travel.start, tuple(needs), tells)
