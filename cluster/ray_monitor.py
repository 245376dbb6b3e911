"""The driver's part in a run on Ray: it passes events on, tells what happens, and decides.

Every loss, wait and start is one line with its time, attempt, rank, node and cause.
"""

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Protocol

import ray
from ray.train.v2.api.exceptions import TrainingFailedError

from cluster.contract import Caller, ClusterConfig, ClusterUnavailable, LostWorkers, Outcome
from cluster.failure import Failure, WorkerFailed
from cluster.ray_gate import NodeGate
from cluster.ray_leaving import End, Leave, LeaveWatch, format_ranks
from cluster.ray_loss import Loss
from cluster.ray_mailbox import (
    Advanced,
    Begun,
    Broken,
    Event,
    Finished,
    Kept,
    Lacking,
    Left,
    Mailbox,
    Note,
    Output,
    Readmitted,
    Seat,
    Started,
)
from cluster.ray_output import OutputLog
from cluster.ray_wait import Wait, with_time
from cluster.recovery import Fault, History, decide, readmit

_TICK_S = 0.25
"""How often the driver looks for a stop request, and what else it waits for; an event wakes it."""
_TIDY_UP_S = 30.0
"""What Ray Train gets to end by itself once the workers have: on a busy machine more than seconds.
Ray may abort a process of which a thread still calls it when its cluster is gone."""
_MOST_PLACES = 4
"""Of so many nodes it is told where logs of workers are that died there."""
_WORDS_S = 10.0
"""How long a run that is given up waits for the last words of its workers."""

_log = logging.getLogger(__name__)


class Fit(Protocol):
    """Ray Train at work in a thread of its own."""

    error: BaseException | None

    def is_alive(self) -> bool:
        """Whether it still works."""
        ...

    def join(self, timeout: float | None = None) -> None:
        """Waits for its end."""
        ...


class Standing:
    """How far a run has come, by what its workers tell.

    Attributes:
        attempt: The attempt; -1 before the first.
        seats: Where its workers run.
        at_work: Whether they have met, and nothing is amiss.
        starting: Whether they are to be started again, and are not there yet.
        failures: What its workers told of theirs.
        left: The ranks that returned because they were asked to leave.
        saves: How many times the run has saved more images than before.
        blur_images: The most images that were trained between two tellings of how many they are.
    """

    def __init__(self) -> None:
        self.attempt = -1
        self.seats: tuple[Seat, ...] = ()
        self.at_work = False
        self.starting = False
        self.failures: list[Failure] = []
        self.left: set[int] = set()
        self.saves = 0
        self.blur_images = 0
        self._ended: set[int] = set()
        self._images: int | None = None
        self._kept: int | None = None
        self._proven: tuple[Seat, ...] = ()

    @property
    def restarts(self) -> int:
        """How many times the workers were started again."""
        return max(self.attempt, 0)

    def is_done(self) -> bool:
        """Whether all workers have returned."""
        return bool(self.seats) and len(self._ended) == len(self.seats)

    @property
    def proven(self) -> int:
        """How many workers there were when an update was last made; 0 before the first."""
        return len(self._proven)

    def has_outgrown(self) -> bool:
        """Whether there are more workers than at the last update, and none was made with them."""
        return self._is_unproven() and len(self.seats) > self.proven

    def ends_with(self, refusal: Failure) -> bool:
        """Whether a refusal ends the run: not if workers that came to a healthy run may be why.

        Args:
            refusal: By a worker of this attempt, or a late one of an attempt before.
        """
        new = {seat.node for seat in self.seats}.difference(seat.node for seat in self._proven)
        is_on_trial = self.has_outgrown() or (self._is_unproven() and bool(new))
        return not (is_on_trial or self.starting or refusal.attempt < self.attempt)

    def judge(self, broken: Broken) -> Broken:
        """What a failure is of: of the start, and not of the attempt before, until one starts."""
        if self.starting and broken.kind == "workers":
            return replace(broken, kind="start", failures=())
        return broken

    def _is_unproven(self) -> bool:
        return self.proven > 0 and self._images is None and not self.starting

    def await_start(self) -> None:
        """Forgets all of the attempt that is over but who was there."""
        self.at_work, self.starting = False, True
        self.failures, self.left, self._ended, self._images = [], set(), set(), None

    def take(self, event: Event) -> None:
        """Takes what a worker, or the controller of its start, tells."""
        match event:
            case Started(attempt, seats):
                self.await_start()
                self.attempt, self.seats, self.starting = attempt, seats, False
            case _ if self.starting and not isinstance(event, Kept):
                pass  # late news of the attempt that is over
            case Begun(attempt):
                self.at_work = attempt == self.attempt
            case Finished(attempt, rank) if attempt == self.attempt:
                self._ended.add(rank)
            case Left(attempt, rank) if attempt == self.attempt:
                self.left.add(rank)
            case Advanced(attempt, images) if attempt == self.attempt:
                if self._images is not None:
                    self.blur_images = max(self.blur_images, images - self._images)
                self._images, self._proven = images, self.seats
            case Kept(images) if self._kept is None or images > self._kept:
                self._kept, self.saves = images, self.saves + 1
            case Failure() if event.attempt == self.attempt:
                self.failures.append(event)

    def farthest(self, failures: Sequence[Failure]) -> int | None:
        """Images that the attempt has trained; None if none of it is known to."""
        told = (self._images, *(one.images for one in failures))
        return max((images for images in told if images is not None), default=None)

    def describe(self, images: int | None) -> str:
        """What is trained and saved, in words."""
        kept = "nothing is saved" if self._kept is None else f"{self._kept:,} images are saved"
        return kept if images is None else f"{images:,} images were trained, {kept}"


class RunMonitor:
    """Passes events and the stop on until the workers are done.

    Args:
        config: The run's.
        mailbox: What lies between the driver and the workers.
        fit: Ray Train, started.
        caller: Who started the run.
        watch: Looks for reasons to leave; None where there can be none.
        output: What there is of the workers' lines.
        gate: Looks at nodes that come; None where any may get workers.
    """

    def __init__(
        self,
        config: ClusterConfig,
        mailbox: Mailbox,
        fit: Fit,
        caller: Caller,
        *,
        watch: LeaveWatch | None,
        output: OutputLog,
        gate: NodeGate | None = None,
    ) -> None:
        self._config = config
        self._mailbox = mailbox
        self._inbox = mailbox.inbox()
        self._fit = fit
        self._caller = caller
        self._history = History()
        self._standing = Standing()
        self._watch = watch
        self._gate = gate
        self._leave: Leave | None = None
        self._wait = Wait(self._tell_wait, room_timeout_s=config.room_timeout_s)
        self._loss: Loss | None = None
        self._output = output
        self._silent: list[tuple[Loss, LostWorkers]] = []
        self._allowed_s = float("inf")
        self._most: int | None = None

    def run(self) -> Outcome:
        """Waits for the workers.

        Returns:
            How the run ended.

        Raises:
            WorkerRefused: A worker raised a ValueError.
            WorkerFailed: The workers failed, and are not started again.
            ClusterUnavailable: Ray was lost.
        """
        stopped = False
        try:
            while self._fit.is_alive() and not self._standing.is_done():
                stopped = stopped or self._look_for_stop()
                self._handle(self._inbox.fetch(_TICK_S))
                if stopped and not self._standing.at_work and self._loss is None:
                    return Outcome(status="stopped", restarts=self._standing.restarts)
                self._recover(stopped=stopped)
                self._look_for_leave()
                if self._gate is not None:
                    self._gate.look()
                self._tell_words()
                self._wait.look()
            self._handle(self._inbox.fetch_rest())
            self._tell_words()
            self._output.close(timeout_s=_WORDS_S)
        except ray.exceptions.RayError as error:
            raise ClusterUnavailable(
                f"The run lost Ray, or Ray could not load it: {_last_line(error)}\nWhere a module "
                "is missing, the workers do not find this process's code: start it in the "
                "directory of the code, or by `ray job submit --working-dir .`."
            ) from error
        if self._standing.is_done():
            # All returned: what Ray Train still has to tidy up cannot fail the run any more.
            self._fit.join(_TIDY_UP_S)
        elif isinstance(self._fit.error, TrainingFailedError):
            raise WorkerFailed(f"The workers could not be run: {self._fit.error}")
        elif self._fit.error is not None:
            raise ClusterUnavailable(f"Ray failed: {self._fit.error}") from self._fit.error
        return Outcome(
            status="stopped" if stopped else "finished", restarts=self._standing.restarts
        )

    def _handle(self, events: Iterable[Event]) -> None:
        for event in events:
            match event:
                case Failure(kind="refused") if self._standing.ends_with(event):
                    raise event.error()
                case Note(text):
                    self._caller.report(text)
                case Lacking(text):
                    self._wait.note(text)
                case Broken():
                    self._begin_loss(event)
                case Output():
                    self._output.take(event)
                case Readmitted():
                    self._avoid(readmit(self._history))
                    self._tell("no node is avoided any more: the others do not suffice")
                case dict():
                    self._caller.on_message(event)
                case _:
                    self._standing.take(event)
            self._follow_output(event)
            if isinstance(event, Started):
                self._wait.end()
                self._leave = None
                for line in seating(event):
                    self._tell(line)

    def _follow_output(self, event: Event) -> None:
        match event:
            case Started():
                self._output.begin(event)
            case Advanced(attempt):
                self._output.advance(attempt)
            case Finished(attempt, rank) | Left(attempt, rank):
                self._output.end(attempt, [rank])

    def _begin_loss(self, broken: Broken) -> None:
        standing = self._standing
        standing.at_work = False
        self._wait.begin()
        broken = standing.judge(broken)
        died = {one.rank for one in broken.failures if one.kind == "died"}
        reads = self._output.read(standing.attempt, died) if died else []
        self._loss = Loss(broken, standing.seats, self._leave, reads=reads)

    def _recover(self, *, stopped: bool) -> None:
        """Decides what follows a failure, once its cause is known, and waits as decided."""
        if self._loss is None:
            return
        if self._allowed_s == float("inf"):
            standing = self._standing
            if not self._loss.is_known(standing.failures, standing.left):
                return
            failures = self._loss.failures(standing.failures, standing.left)
            if stopped and standing.left and not failures:
                self._loss = None  # asked to leave and to stop, all have returned in order
            else:
                self._decide(self._loss, failures, stopped=stopped)
        elif stopped:
            self._loss = None  # the run ends here, where it is saved
        elif time.monotonic() >= self._allowed_s:
            self._loss, self._allowed_s = None, float("inf")
            more = None if self._leave is None else self._leave.workers
            # Before the first start that came to be there are no seats.
            workers = more or len(self._standing.seats) or self._config.workers
            self._mailbox.allow(
                min(workers, self._most or workers),
                most=self._most,
                avoided=self._history.avoided,
            )
            self._leave = None
            self._standing.await_start()

    def _decide(self, loss: Loss, failures: Sequence[Failure], *, stopped: bool) -> None:
        standing = self._standing
        images = standing.farthest(failures)
        seat = loss.origin(failures)
        fault = Fault(
            kind=loss.kind,
            at_s=time.monotonic(),
            images=images,
            blur_images=standing.blur_images,
            saves=standing.saves,
            node=None if seat is None else seat.node,
            workers=0 if standing.starting else len(standing.seats),
            proven=standing.proven,
        )
        history, decision = decide(self._history, fault, self._config)
        self._avoid(history)
        cause = loss.describe(failures)
        where = f"attempt {standing.restarts}: {cause}; {standing.describe(images)}"
        if stopped or loss.broken.kind == "else" or decision.action == "stop":
            reason = "a stop was asked for" if stopped else decision.reason
            if loss.broken.kind == "else":
                reason = "starting them again would not help"
            self._keep_words(loss, cause)
            loss.has_spoken(timeout_s=_WORDS_S)
            self._tell_words()
            self._output.close(timeout_s=_WORDS_S)
            self._tell(f"{where}; the workers are not started again: {reason}")
            raise loss.error(failures, reason=reason)
        if decision.most is not None:
            self._shrink(loss, cause, decision.most, decision.reason)
            return
        when = f"in {decision.wait_s:g} s" if decision.wait_s else "at once"
        self._tell(f"{where}; the workers start again {when}: {decision.reason}")
        if decision.avoids is not None and seat is not None:
            self._tell(
                f"{seat.address} ({seat.host}) is avoided while other nodes suffice: "
                f"{history.of_node} failures in a row began there, and none elsewhere "
                f"(cluster.max_failures_of_node={self._config.max_failures_of_node})"
            )
        self._keep_words(loss, cause)
        self._allowed_s = time.monotonic() + decision.wait_s

    def _avoid(self, history: History) -> None:
        self._history = history
        if self._watch is not None:
            self._watch.avoid(history.avoided)

    def _shrink(self, loss: Loss, cause: str, most: int, reason: str) -> None:
        """Goes back to as many workers as are known to train, for the rest of the launch."""
        self._most = most
        if self._watch is not None:
            self._watch.stop_growing()
        self._tell(
            f"attempt {self._standing.attempt}: {cause}; {reason}, so {most} start again at once, "
            "as many as trained before, and this launch takes no more"
        )
        self._keep_words(loss, cause)
        self._allowed_s = time.monotonic()

    def _look_for_stop(self) -> bool:
        """Asks all workers to save and to stop, if somebody wants it or the driver's node goes."""
        end: End | None = None
        # Not stop.wait(): the event may be set by a signal handler that interrupts this very
        # thread, and would then wait for the lock that wait() holds.
        if not self._caller.stop.is_set():
            end = None if self._watch is None else self._watch.look_home()
            if end is None:
                return False
            self._tell(
                f"{end.reason}; all workers save, and the run ends, for what starts them again "
                "is there: the same command goes on from the last save"
            )
            self._caller.stop.set()
        self._mailbox.ask_to_stop(None if end is None else end.grace_s)
        return True

    def _look_for_leave(self) -> None:
        """Has all workers save and leave, if there is a reason."""
        if self._watch is None or self._leave is not None or self._loss is not None:
            return
        standing = self._standing
        if not standing.at_work:
            return  # the seats are those of workers that are gone, or have not met
        self._leave = self._watch.look(standing.seats, saves=standing.saves)
        if self._leave is not None:
            self._tell(
                f"attempt {standing.attempt}: {self._leave.reason}; all workers save and leave"
            )
            self._mailbox.ask_to_leave(standing.attempt, self._leave.grace_s)

    def _keep_words(self, loss: Loss, cause: str) -> None:
        """Has those that died told as lost once their last words are there; no start waits."""
        for rank in loss.first_of_nodes()[:_MOST_PLACES]:
            if hint := loss.place_of_logs(rank):
                self._tell(f"worker {rank}: {hint}")
        lost = LostWorkers(attempt=self._standing.attempt, ranks=loss.died, cause=cause)
        self._silent.append((loss, lost))

    def _tell_words(self) -> None:
        self._output.look()
        for loss, lost in [told for told in self._silent if told[0].has_spoken()]:
            self._silent.remove((loss, lost))
            self._output.look()  # what was read since
            self._output.end(lost.attempt, lost.ranks)
            if lost.ranks:
                self._caller.listener.lose(lost)

    def _tell_wait(self, text: str) -> None:
        # Of the attempt that is over; before the first there is none.
        attempt = self._standing.attempt
        self._tell(f"attempt {attempt}: {text}" if attempt >= 0 else text)

    def _tell(self, text: str) -> None:
        self._caller.report(with_time(text))


def seating(started: Started) -> list[str]:
    """Who runs where, a line for each node if there are several."""
    seats = started.seats
    ranks_of: dict[str, list[int]] = {}
    for rank, seat in enumerate(seats):
        ranks_of.setdefault(f"{seat.address} ({seat.host})", []).append(rank)
    opening = f"attempt {started.attempt}: {len(seats)} workers on "
    if len(ranks_of) == 1:
        return [opening + next(iter(ranks_of))]
    return [f"{opening}{len(ranks_of)} nodes"] + [
        f"attempt {started.attempt}: {format_ranks(ranks)} on {node}"
        for node, ranks in ranks_of.items()
    ]


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
