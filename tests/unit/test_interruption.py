"""Ctrl-C at any moment, imports included: no traceback, exit code 130, and no process left."""

import os
import signal
import subprocess
import sys

import pytest

from tests.support.job import ROOT
from trainer.checkpoint.layout import MANIFEST_NAME

# Read by Python before all else: sends Ctrl-C when a module is imported, or a file opened.
INTERRUPTING = """
import os, signal, sys
wanted = os.environ.pop("INTERRUPT_AT")
sent = []
def watch(event, arguments):
    if event in ("import", "open") and wanted in str(arguments[0]) and not sent:
        sent.append(wanted)
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(watch)
"""


def interrupted(tmp_path, at: str, *words: str) -> tuple[int, str]:
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTING)
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "PYTHONPATH": path, "INTERRUPT_AT": at},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        # A shell has what it starts in the background ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    return ended.returncode, ended.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "at"),
    [
        ("trainer.sample", "pydantic"),
        ("trainer.inpaint", "pydantic"),
        ("trainer.evaluate", "pipelines.console"),
        ("trainer.checkpoints", "trainer.cli.checkpoints"),
        ("trainer.plan", "cluster.hardware"),
        ("trainer.compare_losses", "pipelines.console"),
        ("trainer.launch", "pipelines.console"),
        ("trainer", "trainer.cli.lapflow"),
        ("trainer sample", "pydantic"),
        ("pipelines.ingest", "pipelines.errors"),
        ("pipelines.ingest.latents", "numpy"),
        ("benchmarks.sampling", "torch"),
        ("tests.fuzz", "pipelines.console"),
        ("benchmarks.data", "benchmarks.command"),
    ],
)
def test_an_interrupt_during_imports_is_quiet(tmp_path, command, at):
    assert interrupted(tmp_path, at, "-m", *command.split(), "--help") == (130, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("trainer.sample", "checkpoint={run}"),
        ("trainer.checkpoints", "verify", "{run}"),
        ("trainer", "checkpoints", "verify", "{run}"),
    ],
)
def test_an_interrupt_during_the_work_is_quiet(tmp_path, words):
    manifest = tmp_path / "runs" / "a" / "checkpoints" / "000000000100" / MANIFEST_NAME
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}")
    run = str(manifest.parent)
    found = [word.format(run=run) for word in words]
    code, output = interrupted(tmp_path, MANIFEST_NAME, "-m", *found)
    assert code == 130
    # Nothing but what the command says of its work.
    assert [line for line in output.splitlines() if not line.startswith("[")] == []


@pytest.mark.slow
def test_an_interrupt_of_the_console_script_is_quiet(tmp_path):
    script = tmp_path / "lapflow"  # as pip writes it
    script.write_text("import sys\nfrom trainer.cli.lapflow import main\nsys.exit(main())\n")
    assert interrupted(tmp_path, "pydantic", str(script), "sample", "--help") == (130, "")


def test_programs_that_use_the_packages_keep_their_tracebacks():
    script = "import trainer; raise KeyboardInterrupt"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert b"Traceback" in ended.stderr
