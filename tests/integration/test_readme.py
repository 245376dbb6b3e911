"""What README.md, docs/first-steps.md and docs/scale-out.md say, typed on a machine of its own.

One machine and one run serve all tests, as one user types one page after the other.
"""

from __future__ import annotations

import re
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.job import ROOT, SMALL
from tests.support.terminal import Machine, Terminal, machine
from trainer.checkpoint.reader import CheckpointReader
from trainer.storage.open import open_store
from trainer.storage.store import StoreConfig

pytestmark = pytest.mark.slow

# The pages' runs, made short by settings and nothing else.
SHORT = " ".join(
    [setting for setting in SMALL if setting[0] != "+" and "address" not in setting]
    + ["train.total_images=2560"]
)


def lines(page: str, *, having: str) -> list[str]:
    """The lines of the block of a page that has a line with these words, without comments."""
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    (block,) = (block for block in blocks if having in block)
    return [line.partition("  #")[0].rstrip() for line in block.splitlines() if line]


def line(page: str, words: str, *, having: str) -> str:
    """The one line of them that begins with these words."""
    (found,) = (each for each in lines(page, having=having) if each.startswith(words))
    return found


def readme(words: str) -> str:
    return line("README.md", words, having="make train")


def first_steps(words: str) -> str:
    return line("docs/first-steps.md", words, having="ray start --head")


def scale_out(words: str) -> str:
    return line("docs/scale-out.md", words, having="ray start --head")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with machine(tmp_path_factory.mktemp("machine")) as up:
        yield up


@pytest.fixture
def terminal(fresh: Machine) -> Iterator[Terminal]:
    with fresh.terminal() as opened:
        yield opened


def newest_images(home: Path) -> int:
    manifest = CheckpointReader(
        open_store(f"{home}/store/runs", StoreConfig()), run="digits"
    ).newest_valid()
    assert manifest is not None
    return manifest.images


def test_the_quick_start_and_its_pages(fresh: Machine, terminal: Terminal) -> None:
    make = readme("make train")
    trained = terminal.type(f'{make} ARGS="{SHORT}"')
    assert "classifier reads the label" in trained
    assert not fresh.path("/tmp/home/.ray").exists()  # nothing that changes the next `ray start`
    assert "this run is complete" in terminal.type(f'{make} ARGS="{SHORT}"')
    assert "grid.png" in terminal.type(readme(".venv/bin/python -m trainer.sample"))
    assert "error: " in terminal.type(f'{make} ARGS="train.total_images=-1"', code=2)

    command, address = re.findall(r"look at the run: (.*?)   opens (\S+)", trained)[0]
    server, experiment = re.findall(r"(http://[^/]+)/#/experiments/(\d+)", address)[0]
    with fresh.terminal() as pages:
        pages.begin(command, until="Application startup complete")
        ask = f"{server}/ajax-api/2.0/mlflow/experiments/get?experiment_id={experiment}"
        fetch = "from urllib.request import urlopen as o; import sys; print(o(sys.argv[1]).read())"
        assert "mlflow" in terminal.type(f".venv/bin/python -c '{fetch}' '{server}/'").lower()
        assert '"lapflow"' in terminal.type(f".venv/bin/python -c '{fetch}' '{ask}'")


def test_jobs_of_a_cluster_are_watched_stopped_and_go_on(
    fresh: Machine, terminal: Terminal
) -> None:
    for words in ("source", "(umask", "export", "ray start"):
        terminal.type(first_steps(words))
    token = fresh.path("/tmp/home/.ray/auth_token")
    assert token.stat().st_mode & 0o077 == 0
    assert scale_out("ray start --head") == first_steps("ray start")

    long = f"{SHORT} train.total_images=640000 checkpoint.keep_last=1"
    jobs = "python -m cluster.jobs"
    submit, again = (scale_out(f"{jobs} submit --id {name}") for name in ("first", "again"))
    terminal.type(f"{submit} {long}")
    assert re.search("job first: (pending|running)", terminal.type(scale_out(f"{jobs} status")))
    with fresh.terminal() as following:
        for words in ("source", "export"):
            following.type(scale_out(words))
        following.begin(scale_out(f"{jobs} logs"), until="checkpoint: .*/0000")
    terminal.type(scale_out(f"{jobs} stop"))
    assert "job first: stopped, exit code 143" in terminal.type(scale_out(f"{jobs} status"))
    home = fresh.path("/tmp/home/lapflow")
    saved = newest_images(home)
    log = terminal.type(scale_out(f"{jobs} logs"), code=143)
    # It is the run that the quick start has begun.
    assert "resumed after 2,560 images" in log
    assert "stopped; run the same command again" in log
    assert f"{saved:012d}" in log

    total = 640 * (saved // 640 + 2)
    rest = f"{SHORT} train.total_images={total}"
    on = terminal.type(f"{first_steps('ray job submit')} {rest}")
    assert f"resumed after {saved:,} images" in on
    assert "classifier reads the label" in on
    assert "succeeded" in on
    assert newest_images(home) == total
    complete = terminal.type(f"{again} {rest}")
    assert "this run is complete" in complete
    assert "job again: succeeded" in complete
    with sqlite3.connect(home / "mlflow.db") as database:
        runs = database.execute("SELECT name, status FROM runs").fetchall()
        steps = database.execute("SELECT step FROM metrics WHERE key = 'loss/total'").fetchall()
    assert runs == [("digits", "FINISHED")]
    assert sorted(step for (step,) in steps) == list(range(640, total + 1, 640))


def test_a_cluster_takes_the_token_that_an_earlier_one_had(terminal: Terminal) -> None:
    terminal.type(first_steps("source"))
    terminal.type(scale_out("ray stop"))
    for words in ("(umask", "export", "ray start"):
        terminal.type(first_steps(words))
    # A job that the cluster takes, runs and sees refused: the token was the right one.
    refused = terminal.type(f"{first_steps('ray job submit')} train.total_images=-1", code=1)
    assert "error: train.total_images=-1" in refused


def test_what_the_commands_leave_stays_here(tmp_path: Path) -> None:
    """Neither git nor Ray takes it along."""
    from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

    typed = "\n".join(
        path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
    )
    here = set(re.findall(r"\boutput=([a-z][\w.-]*)(?=\s)", typed))
    assert {"grid.png", "digits-weights"} <= here
    excluded = get_excludes_from_ignore_files(ROOT, include_gitignore=True)
    for name in sorted(here):
        inside = f"{name}/x" if "." not in name else name
        ignored = subprocess.run(["git", "check-ignore", "-q", inside], cwd=ROOT, check=False)
        assert ignored.returncode == 0, name
        assert any(exclude(ROOT / inside) for exclude in excluded), name
    assert not any(exclude(ROOT / "trainer" / "launch.py") for exclude in excluded)
