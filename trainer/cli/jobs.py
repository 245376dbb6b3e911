"""The command that sends a job to a Ray cluster, follows it to its end, and stops it."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from cluster.job_server import Job, JobServer, JobServerLost, without_mark
from pipelines.command import CommandParser, Outcome, add_answer_options, command_parser
from pipelines.console import say, visible, write
from pipelines.formats import format_duration, format_table
from trainer.cli.command import TO_LEAVE_S, run_logged
from trainer.config.groups import CONFIG_FOLDER

_DESCRIPTION = """\
Send a job to a Ray cluster, follow it to its end, stop it. The exit code is that of the job's own
command, also if the connection breaks, the job is stopped, or its log is followed from elsewhere.

  python -m cluster.jobs submit -- python -m trainer.launch +exp=digits
  python -m cluster.jobs submit --id first --no-wait -- python -m trainer.launch +exp=digits
  python -m cluster.jobs logs first --follow
  python -m cluster.jobs status first
  python -m cluster.jobs stop first        returns when its last checkpoint is saved

The settings of a training job are looked at before anything is sent, and a stop gives it the time
that its last checkpoint may take (checkpoint.grace_s)."""

_EPILOG = """\
exit codes: those of the job's command; 4 if the job server went away and did not come back within
five minutes, 130 if you leave by Ctrl-C: the job goes on then; 2 if a job is refused"""

_UNKNOWN_END = 4
_STOPPED = (0, 128 + signal.SIGINT, 128 + signal.SIGTERM)
"""Exit codes of a job that has ended as it was asked to. One that had not begun has none."""
_TRAIN = (("-m", "trainer.launch"), ("-m", "trainer", "train"), ("lapflow", "train"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = _parser()
    # Behind -- is a command of its own, whose --json is not ours.
    words = sys.argv[1:] if arguments is None else list(arguments)
    own, command = _split(words)

    def parse(given: Sequence[str]) -> argparse.Namespace:
        options = parser.parse_args(given)
        options.command = command
        if (options.action == "submit") != bool(command):
            parser.error(
                "the job's command is missing: submit [options] -- python -m trainer.launch …"
                if options.action == "submit"
                else f"{options.action} takes no command: {shlex.join(command)}"
            )
        return options

    return run_logged(parse, lambda options: _ACTIONS[options.action](options), own)


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in words:
        return words, []
    cut = words.index("--")
    return words[:cut], words[cut + 1 :]


def _submit(options: argparse.Namespace) -> Outcome:
    grace_s, metadata, name = _needs(options.command, options.working_dir)
    if options.stop_grace is not None:
        grace_s = options.stop_grace
    elif _training_settings(options.command) is not None and not _is_own(options.working_dir):
        _tell(
            f"warning: the settings of this job are not looked at, for it is sent from "
            f"{visible(str(Path(options.working_dir).resolve()))}, and this code lies in "
            f"{visible(str(CONFIG_FOLDER.parent))}; a stop gives it {grace_s:.0f} s, whatever "
            "checkpoint.grace_s is: --stop-grace SECONDS gives it more"
        )
    server = JobServer(options.address)
    job_id = server.submit(
        options.command,
        working_dir=options.working_dir,
        stop_grace_s=grace_s,
        job_id=options.id or (name and f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"),
        metadata=metadata,
    )
    say(f"job {job_id}: sent to {server.address}; a stop gives it {grace_s:.0f} s to end")
    if options.no_wait:
        hint = f"python -m cluster.jobs logs {job_id} --follow"
        return Outcome(f"follow it by: {hint}", {"job": job_id, "address": server.address})
    return _follow(server, job_id)


def _needs(command: Sequence[str], working_dir: str) -> tuple[float, Mapping[str, str], str | None]:
    """What a job needs to end well, what to write down beside it, and a name for it.

    Raises:
        ConfigError: It is a training job whose settings cannot be.
    """
    overrides = _training_settings(command)
    if overrides is None or not _is_own(working_dir):
        return TO_LEAVE_S, {}, None
    from trainer.config import paths
    from trainer.config.composition import compose_job
    from trainer.config.sweeps import expand_sweep

    settings = [word for word in overrides if "=" in word and not word.startswith("-")]
    if {"-m", "--multirun"} & {*overrides}:
        # Each run needs about the same; the job itself is none of them.
        grace_s = max(point.job.checkpoint.grace_s for point in expand_sweep(settings).points)
        return grace_s + TO_LEAVE_S, {}, None
    job = compose_job(settings)
    told = {"run": job.run, "uri": paths.run_uri(job), "workers": str(job.cluster.workers)}
    return job.checkpoint.grace_s + TO_LEAVE_S, told, job.run


def _is_own(working_dir: str) -> bool:
    """Whether a job runs the code that runs here, so that its settings can be looked at here."""
    return Path(working_dir).resolve() == CONFIG_FOLDER.parent


def _training_settings(command: Sequence[str]) -> Sequence[str] | None:
    """The words behind the command that trains; None if it is another one."""
    for start in range(len(command)):
        for words in _TRAIN:
            if tuple(command[start : start + len(words)]) == words:
                return command[start + len(words) :]
    return None


def _follow(server: JobServer, job_id: str) -> Outcome:
    printer = _LinePrinter()
    try:
        job = server.follow(job_id, write=printer.take, note=_tell)
    except JobServerLost as error:
        return Outcome("", {"job": job_id}, _UNKNOWN_END, error=str(error))
    except KeyboardInterrupt:
        hint = f"python -m cluster.jobs stop {job_id}"
        say(f"job {job_id} goes on; stop it by: {hint}", to=sys.stderr)
        return Outcome("", {"job": job_id}, 128 + signal.SIGINT)
    printer.end()
    return _ended(job)


def _ended(job: Job) -> Outcome:
    code = job.exit_code
    error = ""
    if code is None:
        code = 1
        error = f"job {job.id} {job.status.lower()}, and its command left no exit code"
        error += f": {visible(job.message.strip().splitlines()[0])}" if job.message.strip() else ""
    return Outcome(_line(job), _values(job), code, error=error)


def _logs(options: argparse.Namespace) -> Outcome:
    server = JobServer(options.address)
    if options.follow:
        return _follow(server, options.id)
    printer = _LinePrinter()
    printer.take(server.log(options.id))
    printer.end()
    return Outcome("", {"job": options.id})


def _status(options: argparse.Namespace) -> Outcome:
    server = JobServer(options.address)
    if options.id:
        job = server.job(options.id)
        return Outcome(_line(job), _values(job))
    jobs = [server.job(each) for each in server.jobs()]
    rows = [("job", "status", "exit code", "time"), *map(_cells, jobs)]
    text = format_table(rows) if jobs else f"{server.address} has had no jobs"
    return Outcome(text, {"jobs": [_values(job) for job in jobs]})


def _stop(options: argparse.Namespace) -> Outcome:
    server = JobServer(options.address)
    if server.stop(options.id):
        say(f"job {options.id}: asked to stop; waiting for its end")
    try:
        job = server.wait(options.id, note=_tell)
    except JobServerLost as error:
        return Outcome("", {"job": options.id}, _UNKNOWN_END, error=str(error))
    if job.exit_code in _STOPPED or (job.exit_code is None and job.status == "STOPPED"):
        return Outcome(_line(job), _values(job))
    if job.exit_code is None:
        return _ended(job)
    logs = f"python -m cluster.jobs logs {job.id}"
    fault = f"job {job.id} ended with exit code {job.exit_code}: see {logs}"
    if job.exit_code == 128 + signal.SIGKILL:
        fault = (
            f"job {job.id} did not end in the time it was given, and was killed: what came after "
            "its newest checkpoint is lost"
        )
    return Outcome(_line(job), _values(job), exit_code=job.exit_code or 1, error=fault)


def _tell(line: str) -> None:
    say(line, to=sys.stderr)


def _line(job: Job) -> str:
    name, status, code, seconds = _cells(job)
    return f"job {name}: {status}{f', exit code {code}' if code else ''}, after {seconds}"


def _cells(job: Job) -> tuple[str, str, str, str]:
    code = "" if job.exit_code is None else str(job.exit_code)
    seconds = "" if job.seconds is None else format_duration(job.seconds)
    return visible(job.id), job.status.lower(), code, seconds


def _values(job: Job) -> dict[str, object]:
    return {
        "job": job.id,
        "status": job.status,
        "driver_exit_code": job.exit_code,
        "seconds": job.seconds,
        "metadata": dict(job.metadata),
    }


class _LinePrinter:
    """Writes a job's text by whole lines, on standard output, without the code at its end."""

    def __init__(self) -> None:
        self._rest = ""

    def take(self, text: str) -> None:
        """Write the lines that are whole now."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            shown = without_mark(line)
            if shown or not line:
                write(shown, sys.stdout)

    def end(self) -> None:
        """Write what is left."""
        if self._rest:
            self.take("\n")


_ACTIONS: dict[str, Callable[[argparse.Namespace], Outcome]] = {
    "submit": _submit,
    "status": _status,
    "logs": _logs,
    "stop": _stop,
}


def _parser() -> CommandParser:
    parser = command_parser("cluster.jobs", description=_DESCRIPTION, epilog=_EPILOG)
    parsers = parser.add_subparsers(dest="action", required=True, metavar="COMMAND")
    add = partial(_subparser, parsers)
    submit = add("submit", "send a job, and follow it to its end: submit [options] -- COMMAND …")
    submit.add_argument("--id", help="the job's name, of which each cluster takes one once")
    submit.add_argument(
        "--working-dir",
        default=".",
        help="folder that the job runs in a copy of; .rayignore and .gitignore say what stays here",
    )
    submit.add_argument("--no-wait", action="store_true", help="do not follow it")
    submit.add_argument(
        "--stop-grace",
        type=_seconds,
        metavar="SECONDS",
        help="what it gets to end once asked to; by itself checkpoint.grace_s and half a minute",
    )
    status = add("status", "say what is known of a job, or of all")
    status.add_argument("id", nargs="?", metavar="ID")
    logs = add("logs", "show what a job has written")
    logs.add_argument("id", metavar="ID")
    logs.add_argument("--follow", "-f", action="store_true", help="until it ends")
    stop = add("stop", "have a job save its last state and end, and wait for that")
    stop.add_argument("id", metavar="ID")
    return parser


def _subparser(
    parsers: argparse._SubParsersAction[CommandParser], name: str, summary: str
) -> argparse.ArgumentParser:
    parser = parsers.add_parser(name, help=summary, description=summary)
    parser.add_argument(
        "--address",
        metavar="http://HOST:8265",
        help="the job server; else $RAY_API_SERVER_ADDRESS, $RAY_ADDRESS, or this machine's",
    )
    add_answer_options(parser, default=argparse.SUPPRESS)
    return parser


def _seconds(word: str) -> float:
    value = float(word)
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"{word} is no time in seconds")
    return value
