"""A command answers once: as text, or as one JSON object that stands alone on standard output."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.command import command_parser, plain_values
from pipelines.console import as_typed, typed, typed_as

# A command with noisy libraries and a noisy child, which ends as its first word says.
NOISY = """
import logging, os, subprocess, sys
from pipelines.command import Outcome, command_parser, run
from pipelines.console import SayingHandler, say

class Refusal(ValueError):
    pass

def make(options):
    say("news")
    say("warning: beware")
    logging.info("logged news")
    logging.warning("logged warning")
    print("a library prints", flush=True)
    os.write(1, b"a library in C writes\\n")
    subprocess.run(["echo", "a child writes"], check=True)
    if options.end == "refuse":
        raise Refusal("use python -m trainer.plan")
    if options.end == "bug":
        raise RuntimeError("a bug")
    if options.end == "interrupt":
        raise KeyboardInterrupt
    if options.end == "half":
        return Outcome("half", {"made": 1}, 3, "the other half")
    return Outcome("whole", {"made": 2}, then=lambda: say("and then"))

logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[SayingHandler()])
parser = command_parser("noisy", description="x")
parser.add_argument("end", choices=["well", "half", "refuse", "bug", "interrupt"])
sys.exit(run(parser.parse_args, make, None, is_refusal=lambda error: isinstance(error, Refusal)))
"""
FOREIGN = ["a library prints", "a library in C writes", "a child writes"]


def ran(*words: str) -> tuple[int, str, list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", NOISY, *words], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr.splitlines()


def test_text_is_for_people():
    code, out, err = ran("well")
    assert code == 0
    assert out.splitlines() == ["news", "warning: beware", *FOREIGN, "whole", "and then"]
    assert err == ["logged news", "logged warning"]


def test_one_object_stands_alone_on_standard_output():
    code, out, err = ran("well", "--json")
    assert (code, json.loads(out)) == (0, {"made": 2, "exit_code": 0})
    assert {"news", "warning: beware", "logged news", *FOREIGN} <= set(err)


@pytest.mark.parametrize("flag", ["-q", "--quiet"])
def test_quiet_leaves_answer_and_warnings(flag):
    code, out, err = ran("well", flag)
    assert code == 0
    # What others write is not ours to hush.
    assert out.splitlines() == [*FOREIGN, "whole"]
    assert err == ["warning: beware", "logged warning"]


@pytest.mark.parametrize(
    ("word", "code", "values"),
    [
        ("half", 3, {"made": 1, "error": "the other half"}),
        ("refuse", 2, {"error": "use python -m trainer.plan"}),
        ("bug", 1, {"error": "RuntimeError: a bug"}),
        ("interrupt", 130, {"error": "interrupted"}),
        ("nonsense", 2, None),
    ],
)
def test_an_error_is_an_answer_too(word, code, values):
    ended, out, err = ran(word, "--json")
    got = json.loads(out)
    # Python ends what nobody catches of Ctrl-C by the signal itself.
    assert ended in (code, -2)
    assert got.pop("exit_code") == code
    assert got == values if values else "invalid choice: 'nonsense'" in got["error"]
    if word in ("half", "refuse"):
        assert err[-1] == f"error: {values['error']}"
    if word == "bug":
        assert "RuntimeError: a bug" in err
        assert any(line.startswith("Traceback") for line in err)


def test_an_error_of_the_words_is_one_line_whatever_it_quotes(capsys):
    parser = command_parser("trainer.launch", description="")
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--nothing=\x1b[2J\nerror: all is well"])
    assert capsys.readouterr().err.endswith(r"--nothing=\x1b[2J\nerror: all is well" + "\n")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_end_nothing(closed):
    alone = "\n".join(
        line for line in NOISY.splitlines() if "a library" not in line and "a child" not in line
    )
    words = [sys.executable, "-c", alone, "half", "--json"]
    bash = ["bash", "-c", f'"$@" {closed}', "bash", *words]
    done = subprocess.run(bash, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    if closed == "2>&-":
        assert json.loads(done.stdout)["made"] == 1
    else:
        assert done.stdout == ""


@dataclass
class Made:
    """What a command could answer with."""

    place: Path
    figures: dict
    parts: tuple


def test_values_are_those_that_json_has():
    made = Made(Path("/a"), {1: float("nan"), "x": float("inf")}, ({3}, None, True, 0.5, 1j))
    plain = {
        "place": "/a",
        "figures": {"1": None, "x": None},
        "parts": [[3], None, True, 0.5, "1j"],
    }
    assert plain_values(made) == plain
    assert json.loads(json.dumps(plain_values(made), allow_nan=False)) == plain


def test_commands_are_called_as_they_were_typed():
    text = "use python -m trainer.plan, or python -m pipelines.ingest.latents."
    assert as_typed(text) == text
    with typed_as({"trainer.plan": "lapflow plan", "pipelines.ingest": "lapflow ingest"}):
        assert as_typed(text) == "use lapflow plan, or python -m pipelines.ingest.latents."
        # Another Python than the one whose script was typed, and words that go on.
        for kept in ("/opt/bin/python -m trainer.plan", "python -m trainer.planet"):
            assert as_typed(kept) == kept
        assert typed("trainer.plan", python="/opt/bin/python") == "lapflow plan"
    assert typed("trainer.plan") == "python -m trainer.plan"
