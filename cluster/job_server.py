"""Jobs of a Ray cluster, by way of its job server: sent, followed to their end, stopped.

`ray job submit` follows a job by one connection, and takes its end for the job's; a job that was
stopped has no exit code there. Here the cluster is asked what became of it, as often as it takes,
and the entrypoint's shell writes the code of its command below the command's last line.
"""

import asyncio
import contextlib
import logging
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from cluster.doors import ADVICE, open_door, use_token
from cluster.tested import TESTED_RAY, require_tested

_REQUEST_TIMEOUT_S = 60.0
_AWAY_S = 300.0
"""How long a server may be away while a job is followed."""
_LOOK_S = 2.0
_SILENCE_S = 30.0
"""After so long without a line it is asked whether the job still runs."""
_NEW_CONNECTION_S = 300.0
"""After so long without a line a connection is taken for broken, whatever it says of itself."""
_VARIABLE = "RAY_API_SERVER_ADDRESS"
_ADDRESS = re.compile(r"https?://(\[[\da-fA-F:]+\]|[\w.-]+)(:\d+)?(/[\w./-]*)?")
_SERVER_ERROR = "failed with status code 5"
"""What Ray's client says of an answer that tells of trouble on the server."""
_BEGINS = "Running entrypoint for job"
"""What Ray writes into a job's log before its command does."""
_END_LINES = 50
"""So much of a log tells how its command ended. Before it begins Ray writes fewer lines."""
_KILLED = 137
_FOLLOWED = "trap : INT TERM; "
_MARK = re.compile(r"cluster\.jobs: exit code (\d+)\s*\Z")


class JobServerError(ValueError):
    """A job server cannot be reached, or does not take what it was sent; the text has the fix."""


class JobServerAway(JobServerError):
    """A job server does not answer, or only that something went wrong there."""


class JobServerLost(RuntimeError):
    """A job server went away while a job was waited for, and did not come back in time."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is known of a job.

    Attributes:
        id: Its name on the cluster.
        status: `PENDING`, `RUNNING`, `SUCCEEDED`, `FAILED` or `STOPPED`.
        message: What Ray says of it.
        exit_code: The command's, 128 and its number for a signal; None while it runs, and where
            nobody knows it.
        seconds: How long it has run; None before it began.
        metadata: What its sender wrote down.
    """

    id: str
    status: str
    message: str
    exit_code: int | None
    seconds: float | None
    metadata: Mapping[str, str]

    @property
    def is_over(self) -> bool:
        """Whether its end is there."""
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")


class JobServer:
    """The job server of a cluster.

    Args:
        address: `http://host:port`; None is $RAY_API_SERVER_ADDRESS, $RAY_ADDRESS, or the cluster
            that runs on this machine.

    Raises:
        JobServerError: It does not answer, or wants a token that is not here.
        UntestedVersion: Ray is installed in a version that its use was not tested with.
    """

    def __init__(self, address: str | None) -> None:
        require_tested("ray", TESTED_RAY)
        if address is not None:
            _check_address(address)
        use_token()
        self._client = _reach(address)
        self.address: str = self._client.get_address()

    def submit(
        self,
        words: Sequence[str],
        *,
        working_dir: str,
        stop_grace_s: float,
        job_id: str | None,
        metadata: Mapping[str, str],
    ) -> str:
        """Sends a job, which runs on the head node.

        Args:
            words: The command.
            working_dir: Folder that it runs in a copy of.
            stop_grace_s: What it gets to end by itself once it is asked to.
            job_id: Its name; None has Ray choose one.
            metadata: What to write down beside it.

        Returns:
            Its name.

        Raises:
            JobServerError: The server is open to others, or refuses it.
        """
        if os.environ.get("RAY_AUTH_MODE") != "disabled" and (door := open_door(self.address)):
            raise JobServerError(
                f"The job server at {self.address} {door}, so whoever reaches it may run what they "
                f"like as you. {ADVICE}. RAY_AUTH_MODE=disabled here says that nobody else can "
                "reach it."
            )
        environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(round(stop_grace_s))}
        with _refusals(f"The job server at {self.address} does not take the job"):
            name: str = self._client.submit_job(
                entrypoint=entrypoint(words),
                submission_id=job_id,
                runtime_env={"working_dir": working_dir, "env_vars": environment},
                metadata=dict(metadata),
            )
        return name

    def job(self, job_id: str) -> Job:
        """What is known of a job.

        Raises:
            JobServerError: There is none of that name, or the server does not answer.
        """
        with _refusals(f"The job server at {self.address} does not tell of job {job_id!r}"):
            details = self._client.get_job_info(job_id)
            status = details.status.value
            code = details.driver_exit_code
            marked = details.entrypoint.startswith(_FOLLOWED)
            if status == "STOPPED" and code is None and marked:
                code = _marked_code(self._log_end(job_id, details.driver_node_id))
        if status == "SUCCEEDED":
            code = 0
        if code is not None and code < 0:  # as Python tells of a signal
            code = 128 - code
        began, ended = details.start_time, details.end_time or 1000 * time.time()
        return Job(
            id=job_id,
            status=status,
            message=details.message or "",
            exit_code=code,
            seconds=(ended - began) / 1000 if began else None,
            metadata=details.metadata or {},
        )

    def jobs(self) -> list[str]:
        """The names of all jobs that were sent, the newest first.

        Raises:
            JobServerError: The server does not answer.
        """
        with _refusals(f"The job server at {self.address} does not list its jobs"):
            found = [each for each in self._client.list_jobs() if each.submission_id]
        return [
            each.submission_id for each in sorted(found, key=lambda each: -(each.start_time or 0))
        ]

    def log(self, job_id: str) -> str:
        """All that a job has written so far.

        Raises:
            JobServerError: There is none of that name, or the server does not answer.
        """
        with _refusals(f"The job server at {self.address} does not tell of job {job_id!r}"):
            text: str = self._client.get_job_logs(job_id)
        return text

    def last_lines(self, job_id: str) -> str:
        """The last lines of what a job has written.

        Raises:
            JobServerError: There is none of that name, or the server does not answer.
        """
        with _refusals(f"The job server at {self.address} does not tell of job {job_id!r}"):
            return self._log_end(job_id, self._client.get_job_info(job_id).driver_node_id)

    def _log_end(self, job_id: str, node: str | None) -> str:
        """The last lines of what a job has written on its node, which may be gigabytes in all."""
        words = {"submission_id": job_id, "node_id": node or "", "lines": str(_END_LINES)}
        answer = self._client._do_request("GET", f"/api/v0/logs/file?{urlencode(words)}")
        if answer.status_code == 200:
            return str(answer.text)
        # Of a job without a log, or on a node that is gone, this knows as little.
        text: str = self._client.get_job_logs(job_id)
        return text

    def stop(self, job_id: str) -> bool:
        """Asks a job to end, which it may take its time for; False if it had ended.

        Raises:
            JobServerError: There is none of that name, or the server does not answer.
        """
        with _refusals(f"The job server at {self.address} does not stop job {job_id!r}"):
            return bool(self._client.stop_job(job_id))

    def follow(
        self, job_id: str, *, write: Callable[[str], None], note: Callable[[str], None]
    ) -> Job:
        """Passes on what a job writes until it is over, whatever becomes of the connection.

        Args:
            job_id: Its name.
            write: Takes text as it comes, each character once.
            note: Takes a line when the server is away, and when it is back.

        Returns:
            The job, which is over.

        Raises:
            JobServerError: There is none of that name.
            JobServerLost: The server was away for five minutes.
        """
        following = _Following(self._client, job_id, write)
        job = self._job_once_it_answers(job_id, note)
        while not job.is_over:
            with contextlib.suppress(*_lost_connections()):
                asyncio.run(following.read())
            job = self._job_once_it_answers(job_id, note)
            if not job.is_over:
                time.sleep(_LOOK_S)
        try:
            following.take_all(self.log(job_id))
        except JobServerError as error:
            note(f"warning: the log's last lines may be missing. {error}")
        return job

    def wait(self, job_id: str, *, note: Callable[[str], None]) -> Job:
        """Waits until a job is over; see `follow`."""
        while not (job := self._job_once_it_answers(job_id, note)).is_over:
            time.sleep(_LOOK_S)
        return job

    def _job_once_it_answers(self, job_id: str, note: Callable[[str], None]) -> Job:
        since = time.monotonic()
        told = False
        while True:
            try:
                job = self.job(job_id)
            except JobServerAway as error:
                away = time.monotonic() - since
                if away > _AWAY_S:
                    raise JobServerLost(
                        f"The job server at {self.address} has been away for {away:.0f} s, and job "
                        f"{job_id!r} may go on without it: python -m cluster.jobs logs {job_id} "
                        f"follows it once the server is back. {error}"
                    ) from error
                if not told:
                    note(f"warning: {error} Trying again for {_AWAY_S:.0f} s.")
                    told = True
                time.sleep(_LOOK_S)
            else:
                if told:
                    note("the job server is back")
                return job


class _Following:
    """What a job has written, passed on once however often it is read from its beginning."""

    def __init__(self, client: Any, job_id: str, write: Callable[[str], None]) -> None:
        self._client, self._job_id, self._write = client, job_id, write
        self._passed_on = 0

    async def read(self) -> None:
        """Reads until the job is over, or the connection seems to be."""
        chunks = self._client.tail_job_logs(self._job_id)
        read, silent = 0, 0.0
        coming = asyncio.ensure_future(anext(chunks, None))
        try:
            while silent < _NEW_CONNECTION_S:
                await asyncio.wait({coming}, timeout=_SILENCE_S)
                if not coming.done():
                    silent += _SILENCE_S
                    details = await asyncio.to_thread(self._client.get_job_info, self._job_id)
                    if details.status.is_terminal():
                        return
                    continue
                chunk, silent = coming.result(), 0.0
                if chunk is None:
                    return
                read = self._take(chunk, read)
                coming = asyncio.ensure_future(anext(chunks, None))
        finally:
            coming.cancel()
            with contextlib.suppress(asyncio.CancelledError, *_lost_connections()):
                await coming
            await chunks.aclose()

    def take_all(self, text: str) -> None:
        """Passes on what is left of the whole text."""
        self._take(text, 0)

    def _take(self, text: str, start: int) -> int:
        """Passes on what is new of a text that begins at character `start`; returns its end."""
        end = start + len(text)
        if end > self._passed_on:
            self._write(text[max(self._passed_on - start, 0) :])
            self._passed_on = end
        return end


def entrypoint(words: Sequence[str]) -> str:
    """The shell's line for a command: it outlives a stop, and writes the command's code down."""
    command = shlex.join(words)
    return f'{_FOLLOWED}{command}; code=$?; echo "cluster.jobs: exit code $code"; exit $code'


def without_mark(line: str) -> str:
    """A line of a job's text, without what the shell of `entrypoint` has added to its last one."""
    return _MARK.sub("", line)


def _marked_code(log: str) -> int | None:
    """The code that the shell wrote down; if it could not, it was killed, or had not begun.

    Args:
        log: The log, or at least `_END_LINES` lines at its end.
    """
    # For a command that ends at once Ray may write last that it begins.
    found = _MARK.search(re.sub(rf"{_BEGINS}.*\s*\Z", "", log[-2000:]))
    if found is None:
        has_begun = _BEGINS in log or log.count("\n") >= _END_LINES
        return _KILLED if has_begun else None
    return int(found[1])


def _lost_connections() -> tuple[type[BaseException], ...]:
    """What a connection fails with; errors of requests are OSErrors, the client's RuntimeErrors."""
    import aiohttp

    return (OSError, RuntimeError, aiohttp.ClientError, asyncio.TimeoutError)


def _check_address(address: str) -> None:
    if not _ADDRESS.fullmatch(address):
        is_plain = {"@", "?", "#"}.isdisjoint(address)  # what passwords come with
        raise JobServerError(
            f"{repr(address) if is_plain else 'What was given'} is no address of a job server, "
            "which has no user and no query: http://HOST:8265"
        )


def _reach(address: str | None) -> Any:
    from ray.job_submission import JobSubmissionClient

    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.ERROR)

    class Client(JobSubmissionClient):  # type: ignore[misc]
        """One whose requests end."""

        def _do_request(self, method: str, endpoint: str, **more: Any) -> Any:
            more.setdefault("timeout", _REQUEST_TIMEOUT_S)
            return super()._do_request(method, endpoint, **more)

    named = address or os.environ.get(_VARIABLE) or os.environ.get("RAY_ADDRESS")
    before = os.environ.get(_VARIABLE)
    if address is not None:
        os.environ[_VARIABLE] = address  # Ray prefers what is there to what it is told
    try:
        with _refusals(f"No job server answers at {named or 'this machine'}"):
            return Client(address)
    finally:
        if address is not None:
            os.environ.pop(_VARIABLE)
            os.environ.update({_VARIABLE: before} if before is not None else {})


@contextlib.contextmanager
def _refusals(what: str) -> Iterator[None]:
    """Turns what Ray raises into one error with a message for people."""
    import ray.exceptions

    try:
        yield
    except JobServerError:
        raise
    except ray.exceptions.AuthenticationError as error:
        raise JobServerError(
            f"{what}: it wants the token of its cluster. Copy ~/.ray/auth_token of the head node "
            "here, or set RAY_AUTH_TOKEN_PATH."
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        away = isinstance(error, OSError) or _SERVER_ERROR in str(error)
        kind = JobServerAway if away else JobServerError
        raise kind(f"{what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The line that tells the reason: of a traceback on the server the last."""
    lines = [line for line in str(error).splitlines() if line.strip(" .")] or [repr(error)]
    return lines[-1 if "Traceback" in lines[0] else 0][:500]
