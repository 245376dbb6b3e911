"""Runs of a sweep as jobs of a Ray cluster, several at a time."""

from __future__ import annotations

import logging
import queue
import re
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from cluster.job_server import Job, JobServer, JobServerError, JobServerLost
from pipelines.console import say
from trainer.cli.command import TO_LEAVE_S
from trainer.cli.sweep import Ended, Make, StopRequest, ended
from trainer.config import paths
from trainer.config.sweeps import SweepPoint

logger = logging.getLogger(__name__)

_LOOK_S = 0.2
_SENDING_S = 60.0
_ERROR = re.compile(r"^error: (.*)$", re.MULTILINE)


def make_as_jobs(count: int, *, address: str | None) -> Make:
    """Return what sends runs to a cluster, in a copy of this folder, and waits for their ends.

    A job of the same run that is on its way already is waited for, and no second one is sent.

    Args:
        count: How many at a time.
        address: The job server; None is as `JobServer` finds it.
    """

    def make(points: Sequence[SweepPoint], stop: StopRequest) -> Iterator[Ended]:
        waiting: queue.SimpleQueue[SweepPoint] = queue.SimpleQueue()
        told: queue.SimpleQueue[Ended] = queue.SimpleQueue()
        for point in points:
            waiting.put(point)
        # One after the other: an address is passed to Ray by way of the environment.
        servers = [JobServer(address) for _ in range(min(count, len(points)))]
        senders = [_Sender(server, waiting, told, stop) for server in servers]
        for sender in senders:
            sender.start()
        left = {point.job.run: point for point in points}
        while left:
            try:
                one = told.get(timeout=_LOOK_S)
            except queue.Empty:
                if not stop.received:
                    continue
                break
            del left[one.point.job.run]
            yield one
        sent = {point.job.run: job_id for point, job_id in filter(None, map(_under_way, senders))}
        while not told.empty():  # it has ended meanwhile
            one = told.get()
            del left[one.point.job.run]
            yield one
        for run, point in left.items():
            job_id = sent.get(run, "")
            hint = f"job {job_id} goes on: python -m cluster.jobs stop {job_id} stops it"
            yield Ended(
                point=point,
                what="stopped" if job_id else "not begun",
                error=hint if job_id else "",
            )

    return make


def _under_way(sender: _Sender) -> tuple[SweepPoint, str] | None:
    """Return what a sender waits for, also if that is being sent just now."""
    deadline = time.monotonic() + _SENDING_S
    while sender.is_alive() and sender.point and not sender.job_id:
        if time.monotonic() > deadline:
            break
        time.sleep(_LOOK_S)
    point, job_id = sender.point, sender.job_id
    return (point, job_id) if point and job_id else None


class _Sender(threading.Thread):
    """Sends a run after the other, and waits for each.

    Args:
        server: Where to.
        waiting: What to send.
        told: Takes what became of it.
        stop: Ends this between two runs.

    Attributes:
        point: The run that is being made; None between two.
        job_id: Its job; "" until that is sent.
    """

    def __init__(
        self,
        server: JobServer,
        waiting: queue.SimpleQueue[SweepPoint],
        told: queue.SimpleQueue[Ended],
        stop: StopRequest,
    ) -> None:
        super().__init__(name="sweep", daemon=True)
        self._server = server
        self._waiting = waiting
        self._told = told
        self._stop_request = stop
        self.point: SweepPoint | None = None
        self.job_id = ""

    def run(self) -> None:
        """Work until nothing waits."""
        while True:
            try:
                point = self._waiting.get_nowait()
            except queue.Empty:
                return
            self.job_id, self.point = "", point
            if (
                self._stop_request.received
            ):  # asked now, as who has asked for the stop sees the point
                self.point = None
                return
            began = time.monotonic()
            try:
                self.job_id = self._known(point) or self._send(point)
                job = self._server.wait(self.job_id, note=say)
                code = 1 if job.exit_code is None else job.exit_code
                error = "" if code == 0 else self._reason(job)
            except (JobServerError, JobServerLost) as lost:
                code, error = 1, str(lost)
            except Exception as mistake:  # who waits for the run would wait for ever
                logger.exception("run %s", point.job.run)
                code, error = 1, f"{type(mistake).__name__}: {mistake}"
            spent = time.monotonic() - began
            self._told.put(ended(point, code, error=error, seconds=spent))
            self.point = None

    def _known(self, point: SweepPoint) -> str:
        """Return the job that makes the run already; "" if there is none."""
        uri = paths.run_uri(point.job)
        for job_id in self._server.jobs():
            # Jobs are named after their runs.
            if job_id.startswith(f"{point.job.run}-"):
                job = self._server.job(job_id)
                if not job.is_over and job.metadata.get("uri") == uri:
                    say(f"run {point.job.run}: job {job_id} is on its way")
                    return job_id
        return ""

    def _send(self, point: SweepPoint) -> str:
        job = point.job
        told = {
            "run": job.run,
            "uri": paths.run_uri(job),
            "workers": str(job.cluster.workers),
        }
        job_id = self._server.submit(
            ["python", "-m", "trainer.launch", *point.words],
            working_dir=str(Path.cwd()),
            stop_grace_s=job.checkpoint.grace_s + TO_LEAVE_S,
            job_id=f"{job.run}-{time.strftime('%Y%m%d-%H%M%S')}",
            metadata=told,
        )
        say(f"run {job.run}: job {job_id}")
        return job_id

    def _reason(self, job: Job) -> str:
        """Return what the job has said last that was wrong."""
        hint = f"python -m cluster.jobs logs {job.id}"
        try:
            found = _ERROR.findall(self._server.last_lines(job.id))
        except JobServerError:
            found = []
        reason = found[-1] if found else f"exit code {job.exit_code}"
        return f"{reason}; {hint} shows its lines"
