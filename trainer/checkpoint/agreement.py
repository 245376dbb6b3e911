"""One decision for all ranks: what fails on one rank is raised on every rank.

What one rank knows is broadcast, and what the first rank must know is sent to it alone. Nothing is
gathered on every rank, because that takes as much memory on each as all ranks have to say.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TypeVar

from pipelines.documents import parse_json
from trainer.checkpoint import errors as checkpoint_errors
from trainer.checkpoint.errors import RankFailed
from trainer.host_group import HostGroup
from trainer.storage import errors as storage_errors
from trainer.storage.errors import CheckpointError

Result = TypeVar("Result")

_KINDS = {
    kind.__name__: kind
    for kind in (vars(storage_errors) | vars(checkpoint_errors)).values()
    if isinstance(kind, type) and issubclass(kind, CheckpointError)
}


class Agreement:
    """Runs a step on the ranks and ends it the same way on all of them.

    Without it a rank whose disk is full would leave while the others wait for it for ever.

    Args:
        ranks: What the ranks agree over.
    """

    def __init__(self, ranks: HostGroup) -> None:
        self._ranks = ranks

    def run_on_all(self, step: Callable[[], Result]) -> Result:
        """Run `step` on every rank and return this rank's result if none failed.

        Raises:
            CheckpointError: The error of the first rank whose step failed; `RankFailed` if it is
                none of ours.
        """
        own: Exception | None = None
        value: Result
        try:
            value = step()
        except Exception as error:
            own = error
        rank, world_size = self._ranks.rank, self._ranks.world_size
        failed = self._ranks.reduce_min(world_size if own is None else rank)
        if failed < world_size:
            told = _encode_error(own, rank) if own is not None else b""
            # A fresh copy: a traceback belongs to one raise.
            raise _decode_error(self._ranks.broadcast(told, source=failed)) from own
        return value

    def gather(self, step: Callable[[], bytes]) -> list[bytes]:
        """Run `step` on every rank; return all results on the first rank, and on others nothing.

        Raises:
            CheckpointError: As for `run_on_all`.
        """
        return self._ranks.gather(self.run_on_all(step))

    def run_on_rank0(self, step: Callable[[], bytes]) -> bytes:
        """Run `step` on the first rank alone and return its result on every rank.

        Raises:
            CheckpointError: As for `run_on_all`.
        """
        own: Exception | None = None
        told = b""
        if self._ranks.rank == 0:
            try:
                told = b"+" + step()
            except Exception as error:
                own, told = error, b"-" + _encode_error(error, 0)
        heard = self._ranks.broadcast(told, source=0)
        if heard[:1] == b"-":
            raise _decode_error(heard[1:]) from own
        return heard[1:]


def _encode_error(error: Exception, rank: int) -> bytes:
    """Put an error into words that travel."""
    for kind in type(error).__mro__:
        if _KINDS.get(kind.__name__) is kind:
            return json.dumps([kind.__name__, str(error)]).encode()
    text = f"Rank {rank} failed with {type(error).__name__}: {error}"
    return json.dumps([RankFailed.__name__, text]).encode()


def _decode_error(told: bytes) -> CheckpointError:
    kind, text = parse_json(told)
    return _KINDS[kind](text)
