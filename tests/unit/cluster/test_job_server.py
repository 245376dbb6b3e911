"""What needs no cluster: the shell's line, what is passed on once, addresses."""

import asyncio
import signal
import subprocess
import time
import zipfile
from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest

from cluster import job_server
from cluster.job_server import (
    Job,
    JobServer,
    JobServerError,
    _Following,
    _marked_code,
    entrypoint,
    without_mark,
)
from tests.house.import_graph import read_import_graph
from tests.house.measures import PACKAGES
from tests.house.source_file import When
from tests.support.job import ROOT
from trainer.cli import jobs


def shell(*words: str) -> subprocess.Popen[str]:
    """Starts what the job server would."""
    return subprocess.Popen(
        entrypoint(words), shell=True, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


class Client:
    """Ray's, which keeps what it is to send."""

    def __init__(self) -> None:
        self.sent: list[str] = []

    def submit_job(self, *, entrypoint: str, **_: object) -> str:
        self.sent.append(entrypoint)
        return "a"


def test_no_job_is_sent_to_a_server_that_is_open_to_others(monkeypatch):
    server = JobServer.__new__(JobServer)
    server._client, server.address = Client(), "http://10.0.0.7:8265"
    asked = []

    def door(address):
        asked.append(address)
        return "asks for no token"

    monkeypatch.setattr(job_server, "open_door", door)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")

    def submit():
        needs = {"working_dir": ".", "stop_grace_s": 30.0, "job_id": None, "metadata": {}}
        return server.submit(["true"], **needs)

    refusal = r"10.0.0.7:8265 asks for no token, so whoever reaches it may run what they like"
    with pytest.raises(JobServerError, match=refusal):
        submit()
    assert (server._client.sent, asked) == ([], [server.address])
    monkeypatch.setattr(job_server, "open_door", lambda _: None)
    assert submit() == "a"
    monkeypatch.setattr(job_server, "open_door", door)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert submit() == "a"


@pytest.mark.parametrize(
    ("command", "more", "is_warned"),
    [
        ("python -m trainer.launch +exp=digits", [], True),
        ("lapflow train +exp=digits", [], True),
        ("python -m trainer.launch +exp=digits", ["--stop-grace", "90"], False),
        ("python -m trainer.launch +exp=digits", ["--working-dir", str(ROOT)], False),
        ("sh train.sh", [], False),  # nothing says that it trains
    ],
)
def test_a_training_job_of_another_folder_is_warned_of_the_time_that_a_stop_gives_it(
    monkeypatch, capsys, tmp_path, command, more, is_warned
):
    sent = {}
    server = SimpleNamespace(
        address="http://127.0.0.1:8265", submit=lambda _, **given: sent.update(given) or "a"
    )
    monkeypatch.setattr(jobs, "JobServer", lambda _: server)
    own = ["submit", "--no-wait", "--working-dir", str(tmp_path), *more]
    assert jobs.main([*own, "--", *command.split()]) == 0
    told = capsys.readouterr().err
    assert (f"sent from {tmp_path}, and this code lies in {ROOT}" in told) == is_warned
    assert ("a stop gives it 30 s, whatever checkpoint.grace_s is" in told) == is_warned
    given_s = {(): 30, ("--stop-grace", "90"): 90}.get(tuple(more), 150)
    assert sent["stop_grace_s"] == given_s


@pytest.mark.parametrize(
    ("status", "code", "answer", "said"),
    [
        ("STOPPED", 143, 0, ""),
        ("STOPPED", None, 0, ""),  # it had not begun
        ("SUCCEEDED", 0, 0, ""),
        ("FAILED", None, 1, "job a failed, and its command left no exit code: the head went away"),
        ("FAILED", 3, 3, "job a ended with exit code 3: see python -m cluster.jobs logs a"),
        ("STOPPED", 137, 137, "job a did not end in the time it was given, and was killed"),
    ],
)
def test_a_stop_answers_with_how_the_job_ended(monkeypatch, status, code, answer, said):
    message = "the head went away"
    job = Job(id="a", status=status, message=message, exit_code=code, seconds=3.0, metadata={})
    server = SimpleNamespace(stop=lambda _: False, wait=lambda _, *, note: job)
    monkeypatch.setattr(jobs, "JobServer", lambda _: server)
    outcome = jobs._stop(SimpleNamespace(address=None, id="a"))
    assert outcome.exit_code == answer
    assert outcome.error.startswith(said)
    assert bool(outcome.error) == bool(answer)


@pytest.mark.parametrize("code", [0, 3, 143])
def test_the_shell_ends_as_its_command_and_writes_that_down(code):
    words = ("sh", "-c", f"echo 'a  b'; exit {code}")
    with shell(*words) as process:
        out = process.communicate()[0]
    assert process.returncode == code
    *lines, mark = out.splitlines()
    assert lines == ["a  b"]
    assert mark.endswith(f" {code}")
    assert without_mark(mark) == ""


def test_a_command_that_was_killed_has_the_code_of_the_signal():
    with shell("sh", "-c", "kill -9 $$") as process:
        assert process.communicate()[0].splitlines()[-1].endswith(" 137")
    assert process.returncode == 137


def test_the_shell_waits_for_a_command_that_ends_late():
    """Each gets the signal, as from the job server."""
    command = "trap 'sleep 0.3; exit 143' TERM; echo up; while :; do sleep 0.05; done"
    with shell("sh", "-c", command) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        subprocess.run(["pkill", "-TERM", "-s", str(process.pid)], check=True)
        rest = process.stdout.read()
    assert process.returncode == 143
    assert rest.splitlines()[-1].endswith(" 143")


def test_a_command_may_still_ignore_nothing():
    """What the shell traps is not ignored by what it starts."""
    with shell("sleep", "60") as process:
        time.sleep(0.2)
        subprocess.run(["pkill", "-TERM", "-s", str(process.pid)], check=True)
        process.communicate()
    assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("log", "code"),
    [
        ("Running entrypoint for job a: true\nb\ncluster.jobs: exit code 143\n", 143),
        ("Running entrypoint for job a: true\nno newlinecluster.jobs: exit code 0\n", 0),
        ("Running entrypoint for job a: true\ncluster.jobs: exit code 0\nmore\n", 137),
        ("the last lines of many\n" * 50, 137),
        ("Runtime env is setting up.\n", None),
        ("", None),
    ],
)
def test_what_a_log_tells_of_the_end_of_a_job_that_was_stopped(log, code):
    assert _marked_code(log) == code


def test_other_lines_keep_what_they_say():
    line = "cluster.jobs: exit code 3 was said before"
    assert without_mark(line) == line
    assert without_mark("no newlinecluster.jobs: exit code 3") == "no newline"


def test_what_was_passed_on_is_not_passed_on_again():
    """However the text is cut, and wherever a connection breaks."""
    text = "".join(f"line {number}\n" for number in range(300))
    breaks = iter([0, 17, 500, 501, 1200])
    taken: list[str] = []

    class Client:
        async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
            last = next(breaks, len(text))
            for start in range(0, last, 23):
                yield text[start : min(start + 23, last)]
            if last < len(text):
                raise ConnectionResetError

        def get_job_info(self, _: str) -> SimpleNamespace:
            raise AssertionError("nothing was silent")

    following = _Following(Client(), "a", taken.append)
    broken = 0
    for _ in range(6):
        try:
            asyncio.run(following.read())
        except ConnectionResetError:
            broken += 1
        following.take_all(text[:40])
    assert broken == 5
    assert "".join(taken) == text
    following.take_all(f"{text}end")
    assert "".join(taken) == f"{text}end"


@pytest.mark.parametrize(
    "address",
    ["10.0.0.1:8265", "ray://head:10001", "http://", "http://me:hunter2@head:8265", "http://a?b=c"],
)
def test_an_address_is_that_of_a_job_server(address):
    with pytest.raises(JobServerError, match="http://HOST:8265") as caught:
        JobServer(address)
    assert "hunter2" not in str(caught.value)


@pytest.mark.slow
def test_what_a_job_takes_along_is_small(tmp_path):
    """`.rayignore` and `.gitignore` leave the rest here."""
    from ray._private.runtime_env.packaging import create_package

    package = tmp_path / "package.zip"
    create_package(str(ROOT), package, include_gitignore=True)
    assert package.stat().st_size < 2 << 20
    with zipfile.ZipFile(package) as opened:
        names = opened.namelist()
    assert "trainer/launch.py" in names
    assert "configs/launch.yaml" in names
    assert not {name.partition("/")[0] for name in names} & {
        ".git",
        ".ci",
        "docs",
        "tests",
        ".venv",
    }
    # Nothing that goes along needs what stays, unless somebody asks for it.
    graph = read_import_graph(ROOT, PACKAGES)
    files = {name: file.path for name, file in graph.files.items()}
    lost = [
        (importer, imported)
        for (importer, imported), when in graph.edges.items()
        if when is When.LOADING and files[importer] in names and files[imported] not in names
    ]
    assert lost == []
