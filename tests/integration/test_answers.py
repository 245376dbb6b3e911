"""Every command, by either name: one JSON object alone, the answer alone, or all for people."""

import contextlib
import importlib
import json
import os
import pty
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.fuzz.material import (
    LAST,
    RUN,
    SETTINGS,
    Material,
    data_of,
    evaluate_arguments,
    launch_arguments,
    make_material,
    run_of,
)
from tests.support.autoencoder import saved_autoencoder
from tests.support.forked import forked, ranks_by_fork
from tests.support.job import ROOT
from tests.support.ports import free_port
from trainer.cli import doctor, lapflow

pytestmark = pytest.mark.slow

LOSSES = ROOT / "tests" / "golden" / "losses"
CURVES = f"{LOSSES}/two_scales.json"


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    """A finished run, with a picture and a mask to fill in, and an autoencoder of RGB images."""
    made = make_material(tmp_path_factory.mktemp("answers"), report=lambda _: None)
    for name in ("image", "mask"):
        pixels = np.full((8, 8), 255, np.uint8)
        pixels[:, 4:] = 0
        Image.fromarray(pixels).save(made.folder / f"{name}.png")
    saved_autoencoder(made.folder / "rgb", channels=3)
    return made


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int | None
    out: str
    err: str


def begin(
    folder: Path, words: list[str], main: Callable[[list[str]], int], terminal: str = ""
) -> BaseProcess:
    """Start a command in a process that has its own standard streams."""
    files = [terminal or str(folder / name) for name in ("out", "err")]
    for name in ("out", "err"):
        (folder / name).write_text("")
    process = forked.Process(target=_command, args=(files, words, main))
    process.start()
    return process


def ended(folder: Path, words: list[str], main: Callable[[list[str]], int]) -> Ended:
    """Run a command to its end."""
    process = begin(folder, words, main)
    process.join()
    return Ended(process.exitcode, (folder / "out").read_text(), (folder / "err").read_text())


def _command(files: list[str], words: list[str], main: Callable[[list[str]], int]) -> None:
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY), number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    doctor.IMPORTS = {"packaging": "import packaging", "numpy": "import numpy"}
    code: Any = 1
    try:
        with ranks_by_fork():
            code = main(words)
    except SystemExit as leaving:
        code = leaving.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


def by_module(words: list[str]) -> int:
    """Do what `python -m` does with the module of a command."""
    name, *rest = words
    module = lapflow.COMMANDS[name].module
    place = module if module.startswith("trainer.") else f"{module}.__main__"
    code: int = importlib.import_module(place).main(rest)
    return code


CASES: list[tuple[str, int]] = [
    ("train {launch}", 0),
    ("train +exp=digits dry_run=true", 0),
    ("train +exp=digits --cfg job", 0),
    ("train --explain optim", 0),
    ("train +exp=digits train.global_batch=7", 2),
    ("train +exp=digits --multirun", 2),
    ("sample checkpoint={run} output={out}/a.png columns=2 sampler.steps=2", 0),
    ("sample", 2),
    (
        "inpaint checkpoint={run} image={folder}/image.png mask={folder}/mask.png label=1 "
        "columns=2 repeats=1 sampler.steps=2 output={out}/b.png",
        0,
    ),
    ("inpaint checkpoint={run} image=nowhere.png mask={folder}/mask.png label=1", 2),
    ("evaluate {evaluate}", 0),
    ("evaluate checkpoint={out}/runs/none", 2),
    ("checkpoints list {run}", 0),
    ("checkpoints list {run} features=inception keep_best=2", 0),
    ("checkpoints verify {run}", 0),
    ("checkpoints export {run} output={out}/weights overwrite=true", 0),
    ("checkpoints prune {run} keep_last=1", 0),
    ("checkpoints list {out}/runs/none", 2),
    ("checkpoints list", 2),
    ("plan +exp=imagenet_xl cluster=h100_8", 0),
    ("plan +exp=imagenet_xl cluster=h100_8 cluster.hardware.gpu_memory_gib=2", 1),
    ("jobs submit", 2),
    ("jobs status --address http://127.0.0.1:1", 2),
    ("jobs logs a --address http://127.0.0.1:1", 2),
    ("jobs stop a --address here", 2),
    ("manifests container", 0),
    ("manifests slurm +exp=digits store.uri=s3://a/b tracking.uri=http://a:5000", 0),
    ("manifests kuberay --image a +exp=digits", 2),
    ("manifests raycluster --image a:b +exp=digits store.uri=s3://a tracking.uri=http://a", 0),
    ("manifests aws --image a +exp=digits", 2),
    ("ui home={out}", 2),
    ("track ship {run} home={out}", 0),
    ("track ship {out}", 2),
    ("report {run}", 0),
    ("report {run} {run} output={out}/page.html", 0),
    ("report {out}/runs/none", 2),
    ("report", 2),
    (f"compare-losses {CURVES} {CURVES}", 0),
    (f"compare-losses {CURVES} {{out}}/none.json", 2),
    ("doctor", 0),
    ("ingest image-folder {images} {out}/set --workers 1", 0),
    ("ingest digits {out}/digits", 0),
    ("ingest huggingface {out}/none {out}/rows", 2),
    ("ingest verify {data}/train --workers 1", 0),
    ("ingest verify {data}/none", 2),
    (
        "ingest-latents {data} {out}/latents --autoencoder {folder}/rgb --image-size 8 "
        "--decoder pillow",
        0,
    ),
    ("ingest-latents {data} {out}/latents --autoencoder {folder}/rgb", 2),
]
SUBCOMMANDS = {
    "checkpoints": {"list", "verify", "export", "prune"},
    "ingest": {"image-folder", "huggingface", "digits", "verify"},
    "jobs": {"submit", "status", "logs", "stop"},
    "track": {"ship"},
    "manifests": {"container", "kuberay", "raycluster", "slurm", "aws"},
}
TALKATIVE = (
    "train {launch}",
    "sample c",
    "inpaint checkpoint={run} image={f",
    "evaluate {e",
    "doctor",
)


def test_every_command_is_among_them():
    words = [case.split() for case, _ in CASES]
    assert {first for first, *_ in words} == set(lapflow.COMMANDS)
    for command, subcommands in SUBCOMMANDS.items():
        assert {rest[0] for first, *rest in words if first == command} == subcommands


@pytest.mark.parametrize(("case", "code"), CASES, ids=[case for case, _ in CASES])
def test_an_answer_stands_alone_by_either_name(material, tmp_path, case, code):
    places = {
        "run": run_of(material.home),
        "data": data_of(material.home),
        "images": material.images,
        "folder": material.folder,
        "out": tmp_path,
    }
    whole = {
        "{launch}": launch_arguments(material.home),
        "{evaluate}": evaluate_arguments(material.home),
    }
    words = [
        re.sub(r"\{(\w+)\}", lambda found: str(places[found[1]]), word)
        for part in case.split()
        for word in whole.get(part, [part])
    ]
    # The short name calls the same function, and changes how commands are called in what it says.
    by_name = lapflow.main if code == 2 else by_module
    for_programs = ended(tmp_path, [*words, "--json"], by_name)
    assert for_programs.code == code, for_programs.err
    values = json.loads(for_programs.out)
    assert values.pop("exit_code") == code
    assert values
    assert ("error" in values) == (code == 2)
    if code == 2:
        assert "error: " in for_programs.err
        assert "python -m" not in for_programs.out + for_programs.err
    people = ended(tmp_path, words, lapflow.main)
    quiet = ended(tmp_path, [*words, "-q"], by_module if code == 2 else lapflow.main)
    assert people.code == quiet.code == code
    assert people.out.endswith(quiet.out)
    # A manifest is a file for another machine, where commands have their own names.
    is_file = case.startswith("manifests") and code == 0
    assert "python -m" not in people.err + people.out * (not is_file)
    if code == 2:
        assert quiet.out == ""
        assert quiet.err.startswith(("error: ", "usage: "))
    else:
        assert quiet.out.strip()
        assert quiet.err == ""
        assert not quiet.out.lstrip().startswith("{")
    if case.startswith(TALKATIVE):
        assert len(quiet.out + quiet.err) < len(people.out + people.err)


def test_a_launch_answers_with_what_it_made(material, tmp_path):
    home = tmp_path / "home"
    words = [*SETTINGS, "run=answers", "cluster.workers=2", f"home={home}"]
    words += [f"data.prefix={data_of(material.home)}", "--events"]
    done = ended(tmp_path, ["train", *words], lapflow.main)
    assert done.code == 0, done.err
    *events, values = map(json.loads, done.out.splitlines())
    assert values["event"] == "answer"
    told = [each for each in events if each["event"] == "progress"]
    assert (told[-1]["images"], told[-1]["total_images"], told[-1]["remaining_s"]) == (
        LAST,
        LAST,
        0,
    )
    assert told[-1]["loss"]["loss/total"] > 0
    saved = [each["uri"] for each in events if each["event"] == "checkpoint"]
    assert saved[-1] == values["checkpoint"]
    assert {"note", "end"} <= {each["event"] for each in events}
    uri = f"{home}/store/runs/answers"
    assert (values["run"], values["uri"], values["outcome"]) == ("answers", uri, "complete")
    assert (values["images"], values["exit_code"]) == (LAST, 0)
    assert values["checkpoint"] == f"{uri}/checkpoints/{LAST:012d}"
    assert Path(values["grid"]).exists()
    assert Path(values["samples"]).exists()
    assert values["report"] == f"{uri}/report.html"
    assert Path(values["report"]).read_text().startswith("<!DOCTYPE html>")
    assert values["figures"]["eval/frechet_random_conv"] > 0
    assert re.fullmatch("[0-9a-f]{32}", values["mlflow_run_id"])
    assert values["look_at_it"].startswith("lapflow ui home=")
    # Lines of progress, of workers and of the store are for people.
    assert re.search(r"192/192 images \(100%\) .* ETA 0s", done.err)
    assert f"checkpoint: {values['checkpoint']}" in done.err


def test_what_is_made_is_told_to_programs(material, tmp_path):
    def values(*words: object) -> dict[str, Any]:
        done = ended(tmp_path, [*map(str, words), "--json"], lapflow.main)
        assert done.code == 0, done.err
        told: dict[str, Any] = json.loads(done.out)
        return told

    newest = f"{run_of(material.home)}/checkpoints/{LAST:012d}"
    drawn = values(
        "sample", f"checkpoint={newest}", f"output={tmp_path}/a.png", "classes=[2,0]",
        "columns=3", "sampler.steps=2",
    )  # fmt: skip
    assert drawn["output"] == f"{tmp_path}/a.png"
    assert (drawn["checkpoint"], drawn["classes"], drawn["images"]) == (newest, [2, 0], 6)
    listed = values("checkpoints", "list", run_of(material.home))
    assert (listed["run"], listed["resume_from"]) == (str(run_of(material.home)), newest)
    assert [each["images"] for each in listed["checkpoints"]] == [64, 128, LAST]
    whole = values("checkpoints", "verify", newest)
    assert (whole["damaged"], whole["checkpoints"][0]["whole"]) == (0, True)
    (report,) = values("evaluate", *evaluate_arguments(material.home))["reports"]
    assert (report["run"], report["images"], report["checkpoint"]) == (RUN, LAST, newest)
    assert [each["features"] for each in report["distances"]] == ["random_conv", "learned_conv"]
    written = values("ingest", "image-folder", material.images, tmp_path / "set", "--workers", 1)
    (dataset,) = written["datasets"]
    assert dataset["prefix"] == f"{tmp_path}/set/train"
    assert (dataset["samples"], dataset["classes"]) == (48, ["class0", "class1", "class2"])
    fine = values("ingest", "verify", tmp_path / "set" / "train", "--workers", 1)
    assert (fine["samples"], fine["faults"]) == (48, [])


def test_pages_are_served_once_the_answer_is_out(material, tmp_path):
    port = free_port()
    words = ["ui", f"home={material.home}", f"port={port}", "--json"]
    process = begin(tmp_path, words, lapflow.main)
    try:
        while process.is_alive() and not (tmp_path / "out").read_text().endswith("}\n"):
            time.sleep(0.1)
        values = json.loads((tmp_path / "out").read_text())
        assert values["served_here"] is True
        assert values["address"].startswith(f"http://127.0.0.1:{port}/#/experiments/")
    finally:
        process.kill()
        process.join()


def test_a_terminal_shows_how_far_reading_is(material, tmp_path):
    ours, theirs = pty.openpty()
    words = ["checkpoints", "verify", str(run_of(material.home))]
    process = begin(tmp_path, words, _on_a_terminal, os.ttyname(theirs))
    process.join()
    os.close(theirs)
    told = b""
    with contextlib.suppress(OSError):  # of a terminal, the end of what was written
        while part := os.read(ours, 1 << 16):  # which comes in pieces
            told += part
    shown = told.decode()
    os.close(ours)
    assert process.exitcode == 0
    assert "━" in shown
    assert "3 whole to the last byte, 0 damaged" in shown


def _on_a_terminal(words: list[str]) -> int:
    os.environ |= {"TERM": "xterm", "CI": ""}
    return lapflow.main(words)
