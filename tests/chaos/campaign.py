"""Faults, one after the other, on one run; and what each of them cost."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from torch import Tensor

from tests.chaos.faults import FAULTS
from tests.chaos.stand import BATCH, INTERVAL, PATIENCE_S, RUN, Stand, StuckRun
from tests.chaos.watch import Mark
from tests.support.job import final_state

SPACING = 3 * INTERVAL
"""Images between two faults, about: some checkpoints."""
_LAST = 8 * INTERVAL
"""Images after the last fault. Until a run hears of a notice, it may train for ten seconds."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One fault to come.

    Attributes:
        name: Of `FAULTS`.
        images: How far the run is by then, at least.
        seed: Decides what the fault leaves open, as which host.
    """

    name: str
    images: int
    seed: int


def plan(seed: int, count: int, *, names: Sequence[str] = tuple(FAULTS)) -> list[Plan]:
    """Choose faults; each kind comes once before any comes again."""
    chance = random.Random(seed)
    chosen: list[str] = []
    while len(chosen) < count:
        chosen += chance.sample(list(names), len(names))
    return [
        Plan(
            name=name,
            images=SPACING * place + BATCH * chance.randrange(1, SPACING // BATCH // 2),
            seed=chance.randrange(2**32),
        )
        for place, name in enumerate(chosen[:count])
    ]


def length(faults: int, *, last: int = _LAST) -> int:
    """Images of a run that so many faults befall, with some to train after them."""
    return SPACING * faults + last


@dataclass(frozen=True, kw_only=True)
class Incident:
    """A fault, and what it cost.

    Attributes:
        name: Of `FAULTS`.
        what: What was done.
        time: When, of `time.monotonic`.
        recovered: When the run had come further than ever before, likewise.
        saved: Images of the newest checkpoint when it began.
        silence_s: The longest time without an update between `time` and `recovered`.
        lost: Images that were trained again.
        at_risk: The most that may be, as `Mark.at_risk` has it.
        starts: How often training began anew.
        earliest: The earliest image that it began at; None if it never did.
        helped: Whether the command had to be given again though the fault did not end the driver.
        announced: Whether the run had time to save.
    """

    name: str
    what: str
    time: float
    recovered: float
    saved: int
    silence_s: float
    lost: int
    at_risk: int
    starts: int
    earliest: int | None
    helped: bool
    announced: bool = False

    def problems(self) -> list[str]:
        """What must not happen."""
        found = []
        if self.earliest is not None and self.earliest < self.saved:
            found.append(f"went back to {self.earliest:,} images though {self.saved:,} were saved")
        if self.lost > self.at_risk:
            found.append(
                f"lost {self.lost:,} images in {self.starts} starts, where {self.at_risk:,} were "
                "not saved, or on their way"
            )
        if self.announced and not self.starts:
            found.append("the run came to its end and did not heed the notice")
        if self.announced and self.lost:
            found.append(f"lost {self.lost:,} images though there was time to save")
        if self.helped:
            found.append("the driver ended, and its command had to be given again")
        return [f"{self.name}: {each}" for each in found]

    def cost(self) -> str:
        """What it cost, for a person."""
        back = f", {self.lost:,} images trained again" if self.starts else ""
        return f"{self.silence_s:.1f} s without an update{back}"

    def line(self) -> str:
        """What was done and what it cost, for a person."""
        return f"{self.what}: {self.cost()}"


@dataclass(kw_only=True)
class Story:
    """A campaign as far as it has come.

    Attributes:
        began: When the run was first launched, of `time.monotonic`.
        ended: When it was complete; 0 before that.
        incidents: What befell it.
        marks: Its progress.
        problems: What must not happen, and did.
    """

    began: float
    ended: float = 0.0
    incidents: list[Incident] = field(default_factory=list)
    marks: Sequence[Mark] = ()
    problems: list[str] = field(default_factory=list)

    def table(self) -> str:
        """What each kind of fault cost."""
        rows = [
            f"{'fault':18}{'times':>6}{'s without an update':>22}{'images again':>14}{'starts':>8}"
        ]
        for name in FAULTS:
            mine = [each for each in self.incidents if each.name == name]
            if mine:
                silences = sorted(each.silence_s for each in mine)
                span = f"{silences[0]:.1f}"
                if len(mine) > 1:
                    span += f" to {silences[-1]:.1f}"
                rows.append(
                    f"{name:18}{len(mine):6}{span:>22}{max(each.lost for each in mine):14,}"
                    f"{sum(each.starts for each in mine):8}"
                )
        return "\n".join(rows)


def run_through(
    stand: Stand,
    plans: Iterable[Plan],
    *,
    images: int,
    seconds: float,
    report: Callable[[str], None],
) -> Story:
    """Launch the run, have faults befall it, and wait for its end.

    Args:
        stand: Where.
        plans: The faults.
        images: Length of the run.
        seconds: After this long no fault begins any more.
        report: Takes lines for a person.
    """
    story = Story(began=time.monotonic(), marks=stand.watch.marks)
    stand.launch()
    firsts: list[int] = []
    try:
        for each in plans:
            if time.monotonic() - story.began > seconds:
                report("no more faults: the time is over")
                break
            if not stand.wait_for_images(each.images, after=story.began):
                story.problems.append(f"the run ended before {each.name!r} could befall it")
                break
            first = len(stand.watch.marks) - 1
            story.incidents.append(_incident(stand, each))
            firsts.append(first)
            report(f"{time.monotonic() - story.began:6.0f} s  {story.incidents[-1].line()}")
        _finish(stand, story)
    except StuckRun as error:
        story.problems.append(str(error))
    story.ended = time.monotonic()
    story.incidents = [
        settle(each, story.marks[first:after])
        for each, first, after in zip(
            story.incidents, firsts, [*(one + 1 for one in firsts[1:]), None], strict=False
        )
    ]
    story.problems += [text for each in story.incidents for text in each.problems()]
    if (newest := stand.newest_saved()) != images:
        story.problems.append(f"the newest checkpoint has {newest:,} images instead of {images:,}")
    return story


def digest(folder: Path) -> str:
    """A hash of all that the newest checkpoint of a shared folder holds, to the bit."""
    state: Mapping[str, Tensor] = final_state(str(folder / "store"), RUN)
    whole = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        whole.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        whole.update(tensor.contiguous().numpy().tobytes())
    return whole.hexdigest()


def _incident(stand: Stand, planned: Plan) -> Incident:
    fault = FAULTS[planned.name]
    reached, saved, first = stand.watch.images, stand.newest_saved(), len(stand.watch.marks) - 1
    began = time.monotonic()
    what = fault.inflict(stand, random.Random(planned.seed))
    over = time.monotonic()
    if fault.ends_driver:
        stand.launch()
    helped = False
    while not stand.wait_for_images(reached, after=over):
        if stand.exit_code() == 0:
            break  # it was near its end
        helped = True
        stand.launch()
    marks = stand.watch.marks[first:]
    incident = Incident(
        name=planned.name,
        what=what,
        time=began,
        recovered=marks[-1].time,
        saved=saved,
        silence_s=0.0,
        lost=0,
        at_risk=0,
        starts=0,
        earliest=None,
        helped=helped,
        announced=fault.announced,
    )
    return settle(incident, marks)


def settle(incident: Incident, marks: Sequence[Mark]) -> Incident:
    """Tell what a fault cost by all that the run told before the next one.

    Args:
        incident: The fault. A run may have trained on for a while before it noticed.
        marks: From the last one before the fault on.
    """
    resumed = [place for place, mark in enumerate(marks) if place and mark.resumed]
    recovered = incident.recovered
    if resumed:
        front = max(mark.reached for mark in marks[1:] if mark.resumed)
        beyond = [mark.time for mark in marks[resumed[-1] :] if mark.images > front]
        recovered = max(recovered, next(iter(beyond), marks[-1].time))
    told = [mark.time for mark in marks if not mark.resumed and mark.time <= recovered]
    starts = [marks[place] for place in resumed]
    return replace(
        incident,
        recovered=recovered,
        silence_s=max((after - before for before, after in pairwise(told)), default=0.0),
        lost=sum(mark.lost for mark in starts),
        at_risk=sum(mark.at_risk(INTERVAL) for mark in starts),
        starts=len(starts),
        earliest=min((mark.images for mark in starts), default=None),
    )


def _finish(stand: Stand, story: Story) -> None:
    """Wait until the run is complete."""
    launches = stand.launches
    while True:
        deadline, seen = time.monotonic() + PATIENCE_S, len(stand.watch.marks)
        while (code := stand.exit_code()) is None:
            if len(stand.watch.marks) > seen:
                deadline, seen = time.monotonic() + PATIENCE_S, len(stand.watch.marks)
            if time.monotonic() > deadline:
                stand.stuck()
            time.sleep(0.1)
        if code == 0:
            return
        story.problems.append(f"the driver ended with {code} though nothing befell it")
        if stand.launches - launches == 3:
            return
        stand.launch()
