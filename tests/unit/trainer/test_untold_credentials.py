"""No command says what may be credentials, wherever a word with some is given to it."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest

from cluster.contract import Line
from pipelines.console import say
from pipelines.ingest.__main__ import main as ingest
from tests.support.job import ROOT
from trainer.cli import lapflow
from trainer.cli.checkpoints import main as checkpoints
from trainer.cli.compare_losses import main as compare_losses
from trainer.cli.console import Console
from trainer.cli.evaluate import main as evaluate
from trainer.cli.latents import main as latents
from trainer.cli.launch import main as launch
from trainer.cli.plan import main as plan
from trainer.cli.sample import main as sample
from trainer.cli.ui import main as ui
from trainer.log_lines import show_logs

PLACES = [
    "https://me:hunter2@host/x.csv",
    "https:/me:hunter2@host/x",
    "https:me:hunter2@host/x",
    "S3://me:hunter2@bucket/x",
    "s3://bucket:hunter2/x",
    "S3:/hunter2@bucket/x",
    "u:hunter2@bucket/x",
    "org/name?token=hunter2",
    "s3://bucket/x#access_token=hunter2",
    "https://host/x?X-Amz-Date=1&X-Amz-Signature=hunter2",
]

COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], list[str]]] = {
    "image-folder": (ingest, ["image-folder", "{}", "out"]),
    "image-folder into": (ingest, ["image-folder", "pictures", "{}"]),
    "--labels": (ingest, ["image-folder", "pictures", "out", "--labels", "{}"]),
    "--classes": (ingest, ["image-folder", "pictures", "out", "--classes", "{}"]),
    "--work-dir": (ingest, ["image-folder", "pictures", "out", "--work-dir", "{}"]),
    "huggingface": (ingest, ["huggingface", "{}", "out"]),
    "--revision": (ingest, ["huggingface", "pictures", "out", "--revision", "{}"]),
    "verify": (ingest, ["verify", "{}"]),
    "--report": (ingest, ["verify", "pictures", "--report", "{}"]),
    "an unknown ingest": (ingest, ["{}"]),
    "a number": (ingest, ["verify", "pictures", "--workers", "{}"]),
    "a word too many": (ingest, ["verify", "pictures", "{}"]),
    "--arrays": (latents, ["a", "b", "--autoencoder", "c", "--arrays", "{}"]),
    "arrays": (latents, ["{}", "out", "--autoencoder", "c", "--arrays", "latents"]),
    "--cache": (latents, ["a", "b", "--autoencoder", "c", "--image-size", "8", "--cache", "{}"]),
    "compare_losses": (compare_losses, ["{}", "run:a"]),
    "list": (checkpoints, ["list", "{}"]),
    "export to": (checkpoints, ["export", "/runs/a", "output={}"]),
    "evaluate": (evaluate, ["checkpoint={}"]),
    "sample": (sample, ["checkpoint={}", "output=g.png"]),
    "plan": (plan, ["{}"]),
    "ui": (ui, ["uri={}"]),
    "lapflow": (lapflow.main, ["{}"]),
    "a member": (launch, ["+exp=digits", "model={}"]),
    "an experiment": (launch, ["exp={}"]),
    "an added experiment": (launch, ["+exp={}"]),
    "a text": (launch, ["+exp=digits", "codec.source={}"]),
    "an autoencoder": (launch, ["+exp=digits", "codec.kind=autoencoder_kl", "codec.source={}"]),
    "a path": (launch, ["+exp=digits", "home={}"]),
    "a store": (launch, ["+exp=digits", "store.uri={}"]),
    "a setting": (launch, ["+exp=digits", "{}=1"]),
}


@pytest.mark.parametrize(
    ("name", "place"),
    [
        # Each command with one of the places, and each place with some, in the fast tests.
        pytest.param(name, place, marks=[pytest.mark.slow] if (i - j) % len(PLACES) else [])
        for i, name in enumerate(COMMANDS)
        for j, place in enumerate(PLACES)
    ],
)
def test_a_command_refuses_credentials_and_tells_none(
    name, place, tmp_path, monkeypatch, capfd, caplog
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "pictures").mkdir()
    main, words = COMMANDS[name]
    for more in ([], ["--json"]):
        if name == "lapflow" and more:
            continue  # what it runs would answer
        try:
            code = main([*(word.format(place) for word in words), *more])
        except SystemExit as end:  # of argparse
            code = end.code
        out, err = capfd.readouterr()
        assert code == 2
        assert "hunter2" not in out + err
        assert "error: " in err
        assert not more or json.loads(out)["error"]


def test_a_log_line_and_a_message_of_a_worker_have_none(capsys):
    text = "cannot reach https://me:hunter2@host/x?token=hunter2"
    with show_logs():
        logging.getLogger("trainer.x").info("%s", text)
        logging.getLogger("a.library").warning("%s", text)
        Console().message({"kind": "warning", "text": f"again, {text}"})
        line = Line(rank=1, node="", attempt=0, level=None, text=f"written, {text}")
        Console().lines.take(line)
        Console().message({"kind": "progress", "text": text})
        say(text)
    said = "".join(capsys.readouterr())
    assert said.count("https://***@host/x?token=***") == 6
    assert "hunter2" not in said


def test_a_traceback_has_none(tmp_path):
    (tmp_path / "buggy.py").write_text(
        "import trainer\nraise RuntimeError('https://me:' + 'hun' + 'ter2@host is gone')\n"
    )
    script = "import sys; sys.argv[0] = '-m'; import buggy"
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("Traceback (most recent call last):\n")
    assert ended.stderr.endswith("RuntimeError: https://***@host is gone\n")
    assert "hunter2" not in ended.stderr


def test_a_folder_may_still_be_called_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for place in ("./u:x@y", f"{tmp_path}/u:x@y"):
        assert ingest(["digits", place, "--json"]) == 0
        prefix = json.loads(capsys.readouterr().out)["datasets"][0]["prefix"]
        assert prefix == f"{place}/train"
    assert (tmp_path / "u:x@y" / "train" / "index.json").is_file()
