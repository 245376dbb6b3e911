"""What README.md, docs/first-steps.md and docs/scale-out.md say, typed on a machine of its own."""

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


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Machine]:
    folder = tmp_path / "machine"
    folder.mkdir()
    with machine(folder) as up:
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


@pytest.mark.parametrize("had_a_token", [False, True])
def test_a_cluster_and_the_same_job_on_it(
    fresh: Machine, terminal: Terminal, had_a_token: bool
) -> None:
    terminal.type(first_steps("source") if not had_a_token else "source .venv/bin/activate")
    if had_a_token:  # as an earlier use of Ray leaves it
        terminal.type("ray get-auth-token --generate")
    for words in ("(umask", "export", "ray start"):
        terminal.type(first_steps(words))
    if had_a_token:
        # A job that the cluster takes, runs and sees refused: the token was the right one.
        refused = terminal.type(f"{first_steps('ray job submit')} train.total_images=-1", code=1)
        assert "error: train.total_images=-1" in refused
    else:
        submitted = terminal.type(f"{first_steps('ray job submit')} {SHORT}")
        assert "classifier reads the label" in submitted
        assert "succeeded" in submitted
        token = fresh.path("/tmp/home/.ray/auth_token")
        assert token.stat().st_mode & 0o077 == 0


def test_a_job_is_watched_stopped_and_goes_on(fresh: Machine, terminal: Terminal) -> None:
    for words in ("source", "(umask", "export", "ray start --head"):
        terminal.type(scale_out(words))
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
    assert "stopped; run the same command again" in log
    assert f"{saved:012d}" in log

    total = 640 * (saved // 640 + 2)
    on = terminal.type(f"{again} {SHORT} train.total_images={total}")
    assert f"resumed after {saved:,} images" in on
    assert "classifier reads the label" in on
    assert newest_images(home) == total
    with sqlite3.connect(home / "mlflow.db") as database:
        runs = database.execute("SELECT name, status FROM runs").fetchall()
        steps = database.execute("SELECT step FROM metrics WHERE key = 'loss/total'").fetchall()
    assert runs == [("digits", "FINISHED")]
    assert sorted(step for (step,) in steps) == list(range(640, total + 1, 640))


def test_a_run_in_a_bucket_goes_on(fresh: Machine, terminal: Terminal) -> None:
    serve = (
        "import time; from pathlib import Path; from tests.support.s3_server import s3_server\n"
        "Path('/tmp/s3').mkdir()\n"
        "with s3_server(Path('/tmp/s3')) as server:\n"
        "    print(server.make_bucket('mine'), server.endpoint_url, flush=True)\n"
        "    time.sleep(3600)"
    )
    with fresh.terminal() as bucket:
        said = bucket.begin(f'.venv/bin/python -c "{serve}"', until="s3://mine http")
        uri, endpoint = re.findall(r"(s3://mine) (http\S+)", said)[0]
        stored = f"{SHORT} store.uri={uri}/runs store.endpoint_url={endpoint}"
        terminal.type("export AWS_ACCESS_KEY_ID=test:tester AWS_SECRET_ACCESS_KEY=testing")
        make = readme("make train")
        terminal.type(f'{make} ARGS="{stored}"')
        longer = terminal.type(f'{make} ARGS="{stored} train.total_images=3840"')
        assert "resumed after 2,560 images" in longer
        assert not fresh.path("/tmp/home/lapflow/store").exists()


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
