"""The table of a campaign, and its figures for machines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.fuzz.attempt import Task
from tests.fuzz.verdict import Seen, Verdict

_HEAD = ("what", "tried", "detected", "harmless", "wrong", "raw")
_COLUMNS = (Verdict.DETECTED, Verdict.HARMLESS, Verdict.WRONG, Verdict.RAW)


@dataclass(frozen=True)
class Finding:
    """What may not happen, and how to see it again.

    Attributes:
        task: The try.
        seen: What was seen.
    """

    task: Task
    seen: Seen

    @property
    def command(self) -> str:
        """The command line that makes the same try again."""
        task = self.task
        return f"python -m tests.fuzz --seed {task.seed} --only {task.kind} --try {task.number}"

    def text(self) -> str:
        """Return it for people."""
        seen = self.seen
        return f"{seen.verdict}: {seen.target}: {seen.attack}\n  again: {self.command}\n{seen.said}"


@dataclass
class Tally:
    """What came of the tries so far.

    Attributes:
        seed: Of the campaign.
        counts: By target and verdict.
        findings: What may not happen, in the order in which it was found.
    """

    seed: int
    counts: Counter[tuple[str, Verdict]] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)

    def add(self, task: Task, seen: Seen) -> None:
        """Count one try."""
        self.counts[seen.target, seen.verdict] += 1
        if seen.verdict.is_bad:
            self.findings.append(Finding(task, seen))

    @property
    def tried(self) -> int:
        """Tries so far."""
        return self.counts.total()

    def table(self) -> str:
        """Return the table in Markdown, which a terminal shows as well."""
        rows = [_HEAD, *self._rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [_line(row, widths) for row in rows]
        rule = [widths[0] * "-", *(f"{(width - 1) * '-'}:" for width in widths[1:])]
        return "\n".join([lines[0], f"| {' | '.join(rule)} |", *lines[1:]])

    def to_dict(self, *, seconds: float) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "seed": self.seed,
            "seconds": seconds,
            "tried": self.tried,
            "targets": {
                name: dict(zip(_HEAD[1:], map(int, numbers), strict=True))
                for name, *numbers in self._rows()
            },
            "findings": [{"command": each.command, **asdict(each.seen)} for each in self.findings],
        }

    def _rows(self) -> list[Sequence[str]]:
        targets = sorted({target for target, _ in self.counts})
        rows: list[Sequence[str]] = [self._row(target, [target]) for target in targets]
        return [*rows, self._row("all", targets)]

    def _row(self, name: str, targets: Sequence[str]) -> Sequence[str]:
        numbers = [sum(self.counts[target, verdict] for target in targets) for verdict in _COLUMNS]
        return (name, str(sum(numbers)), *map(str, numbers))


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = zip(row, widths, strict=True)
    cells = [first[0].ljust(first[1]), *(text.rjust(width) for text, width in rest)]
    return f"| {' | '.join(cells)} |"
