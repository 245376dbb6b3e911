"""`lapflow COMMAND` does what `python -m MODULE` does, and says what was typed."""

import subprocess
import sys

import pytest

from tests.support.job import ROOT
from tests.unit.trainer.test_override import HEAVY
from trainer.cli.lapflow import COMMANDS, main

CURVES = ROOT / "tests" / "golden" / "losses"
# As the console script does it.
LOADED = """
import sys
from trainer.cli.lapflow import main
try:
    code = main()
except SystemExit as leaving:
    code = leaving.code
print(code, *sorted({name.partition(".")[0] for name in sys.modules}))
"""


def ran(*words: str) -> tuple[int, str, str]:
    ended = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    return ended.returncode, ended.stdout, ended.stderr


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], "0"),
        (["train", "--help"], "0"),
        ([], "2"),
        (["nope"], "2"),
        (["train", "+exp=nope"], "2"),
    ],
)
def test_only_the_command_that_is_named_is_imported(words, code):
    _, shown, _ = ran("-c", LOADED, *words)
    got, *modules = shown.splitlines()[-1].split()
    assert got == code
    assert HEAVY & {*modules} == set()


def test_help_names_every_command_in_a_line():
    code, shown, _ = ran("-m", "trainer", "--help")
    assert code == 0
    lines = [line.split(maxsplit=1) for line in shown.splitlines()]
    for name, command in COMMANDS.items():
        assert [name, command.summary] in lines


def test_a_command_that_does_not_exist_is_refused_with_those_that_do():
    code, _, said = ran("-m", "trainer", "launch")
    assert code == 2
    assert all(name in said for name in ("launch", *COMMANDS))


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_help_calls_a_command_by_what_was_typed(name):
    code, shown, _ = ran("-m", "trainer", name, "--help")
    assert code == 0
    assert shown.startswith(f"usage: python -m trainer {name} [-h]")
    assert f"python -m {module_of(name)} " not in shown


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["train", "+exp=digits", "dry_run=true"], 0),
        (["train", "+exp=digits", "train.global_batch=7"], 2),
        (["sample"], 2),
        (["inpaint", "checkpoint={nowhere}"], 2),
        (["evaluate", "checkpoint={nowhere}"], 2),
        (["checkpoints", "list", "{nowhere}"], 2),
        (["plan", "+exp=imagenet_xl", "cluster=h100_8"], 0),
        (["plan", "+exp=imagenet_xl", "cluster=h100_8", "cluster.hardware.gpu_memory_gib=2"], 1),
        (["jobs", "status", "--address", "http://127.0.0.1:1"], 2),
        (["manifests", "slurm", "+exp=imagenet_xl"], 2),
        (["manifests", "container"], 0),
        (["ui", "home={nowhere}"], 2),
        (["compare-losses", f"{CURVES}/two_scales.json", f"{CURVES}/two_scales.json"], 0),
        (["ingest", "verify", "{nowhere}"], 2),
        (["ingest-latents", "{nowhere}", "{nowhere}", "--autoencoder", "a/b"], 2),
    ],
)
def test_it_does_what_the_module_does(tmp_path, words, code):
    name, *rest = (word.format(nowhere=tmp_path / "nowhere") for word in words)
    short = ran("-m", "trainer", name, *rest)
    long = ran("-m", module_of(name), *rest)
    assert short[0] == long[0] == code
    assert said(short).replace(f"trainer {name} ", f"{module_of(name)} ") == said(long)


def module_of(name: str) -> str:
    """The module that `python -m` runs for a command."""
    of_their_own = {
        "train": "trainer.launch",
        "jobs": "cluster.jobs",
        "manifests": "cluster.manifests",
        "ingest": "pipelines.ingest",
        "ingest-latents": "pipelines.ingest.latents",
    }
    return of_their_own.get(name, f"trainer.{name.replace('-', '_')}")


def said(ended: tuple[int, str, str]) -> str:
    """What was said, without the times of the log lines."""
    lines = "".join(ended[1:]).splitlines()
    return "\n".join(line for line in lines if not line.startswith("["))


def test_each_command_is_where_python_finds_it_too():
    for name in COMMANDS:
        assert COMMANDS[name].module == module_of(name)
        path = ROOT.joinpath(*module_of(name).split("."))
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists()


@pytest.mark.parametrize("words", [["ingest"], ["ingest", "verify"], ["train"], ["ui"], ["plan"]])
def test_help_calls_every_command_by_what_was_typed(words, capsys):
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: lapflow {' '.join(words)} ")
    assert "python -m" not in shown


def test_hints_of_what_lies_far_below_call_commands_by_what_was_typed(capsys):
    several = ["train", "+exp=digits", "train.seed=1,2"]
    assert main(several) == 2
    assert "run of each: lapflow train -m … train.seed=1,2" in capsys.readouterr().err
    assert main(several, prog="python -m trainer") == 2
    assert "run of each: python -m trainer train -m … train.seed=1,2" in capsys.readouterr().err
