"""What became of a try, and which errors are ours to raise."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from pipelines import errors as data_errors
from trainer.errors import is_user_error
from trainer.storage.errors import CheckpointError

TRACEBACK = "Traceback (most recent call last)"


class Verdict(StrEnum):
    """How a try ended, from good to bad.

    Attributes:
        HARMLESS: The result is the one without the damage, to the bit; or input was taken in, and
            what came of it is what it says by another, independent reading.
        DETECTED: An error of our own kinds, or a warning that names what is damaged, with the right
            result afterwards.
        WRONG: Another result, and not a word; or something was done that nobody asked for.
        RAW: An exception that is none of ours, a death, a hang, memory far beyond what it takes.
    """

    HARMLESS = "harmless"
    DETECTED = "detected"
    WRONG = "wrong"
    RAW = "raw"

    @property
    def is_bad(self) -> bool:
        """Whether this may not happen."""
        return self in (Verdict.WRONG, Verdict.RAW)


_ORDER = list(Verdict)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What was seen of a try.

    Attributes:
        verdict: How it ended.
        target: What was attacked: the row of the table.
        attack: What was done to it.
        said: What the program said of it.
    """

    verdict: Verdict
    target: str
    attack: str
    said: str


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the worst of several; of none, that nothing happened."""
    return max(verdicts, key=_ORDER.index, default=Verdict.HARMLESS)


def is_ours(error: BaseException) -> bool:
    """Tell whether an error has a message meant for who runs the program."""
    ours = (CheckpointError, data_errors.BadSampleError)
    return is_user_error(error) or isinstance(error, ours)
