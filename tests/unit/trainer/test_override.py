"""What is typed reaches its setting, or is explained in a paragraph of ours."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.config_source import ConfigSource
from hypothesis import given, settings
from hypothesis import strategies as st

import trainer.config.composition
import trainer.config.groups
from pipelines.documents import DocumentError
from tests.support.commands import refusal
from tests.support.configuration import configuration
from trainer.cli.drawing_config import SampleConfig
from trainer.cli.evaluate import main as evaluate
from trainer.cli.launch import main
from trainer.config.composition import _check_header, compose_job, parse_words
from trainer.config.job import JobConfig
from trainer.config.overrides import parse_override
from trainer.config.reading import ConfigError, from_dict, to_dict
from trainer.training.validate import validate

DIGITS = "+exp=digits"


def test_a_setting_that_is_written_with_dashes_is_told_how(capsys):
    for words in (["--seeds", "3"], ["--seeds=3"]):
        with pytest.raises(SystemExit, match="2"):
            evaluate(["checkpoint=x", *words])
        assert "a setting is written without dashes, seeds=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["run", "123", "1", "1e3", "0x10", "true", "on", "1_000", "007"])
def test_a_name_is_a_name_whatever_it_looks_like(name):
    assert compose_job([DIGITS, f"run={name}"]).run == name


def test_a_number_in_a_file_can_be_a_name():
    values = to_dict(configuration(DIGITS))
    assert from_dict(JobConfig, values | {"run": 123}).run == "123"
    with pytest.raises(ConfigError, match=r'run=1000.0 must .* in quotes, "1000.0"'):
        from_dict(JobConfig, values | {"run": 1e3})


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"])))
def test_a_text_reaches_its_setting_as_it_was_typed(text):
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if quoted or text.lower() == "null":
        return
    override = parse_override(f"tracking.experiment={text}", JobConfig)
    assert override.value == text
    parsed = OverridesParser.create().parse_override(override.for_hydra)
    assert (parsed.key_or_group, parsed.value()) == ("tracking.experiment", text)


@pytest.mark.slow
@pytest.mark.parametrize(
    "key",
    [
        "run",
        "store.uri",
        "train.seed",
        "engine.placement",
        "data.streams",
        "model",
        "optim",
        "+run",
    ],
)
def test_no_other_program_speaks_to_the_user(key):
    long, deep = "9" * 5000, "[" * 3000
    unfit = ("~/a", "a#b", "(a", "a,b", "[a", "ü", "a: b", "'", long, f"[0,{long}]", deep)
    for text in unfit:
        error = refusal(lambda text=text: validate(compose_job([DIGITS, f"{key}={text}"]))) or ""
        assert "\n" not in error
        for stranger in ("hydra", "lexer", "token", "omegaconf", "override", "primitive"):
            assert stranger not in error.lower(), error


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("train.seed=0,1", ["train.seed=0,1", "trainer.launch -m … train.seed=0,1"]),
        ("train.seed=range(0,3)", ["train.seed=range(0,3)", "--multirun"]),
        ("data.streams=[{prefix: ~/a}]", ["data.streams", "in quotes", "for the shell"]),
        ("~train.seed", ["~train.seed", "null"]),
        ("train.seed", ["key=value"]),
        ("home=s3://bucket/a", ["home=s3://bucket/a", "a path of this machine"]),
        ("store.uri=", ["store.uri", "empty"]),
        ("home=~nobody-here/a", ["nobody-here", "./~nobody-here/a"]),
        ("run=???", ["run=???", "type it", "run=run"]),
        ("train.seed='???'", ["train.seed=???", "train.seed=0"]),
        ("home=/data/\udcff", [r"home='/data/\udcff' must be a text"]),
        ("store.uri=???", ["store.uri=???", "type it"]),
        ("optim.lr=1", ["optim.lr", "did you mean optim.learning_rate?"]),
        ("train.learning_rate=1", ["did you mean optim.learning_rate?"]),
        ("train.seed=true", ["train.seed=True", "number"]),
        ("tracking.experiment=${oc.env:HOME}", ["tracking.experiment", "environment"]),
        ("tracking.experiment=${oc.decode:${oc.env:HOME}}", ["tracking.experiment", "environment"]),
    ],
)
def test_what_cannot_be_read_is_explained(word, parts):
    with pytest.raises(ConfigError) as caught:
        compose_job([DIGITS, word])
    for part in parts:
        assert part in str(caught.value), str(caught.value)


@pytest.fixture
def theirs(tmp_path, monkeypatch) -> Path:
    """Where an experiment of somebody else is to be."""
    folder = shutil.copytree(trainer.config.groups.CONFIG_FOLDER, tmp_path / "configs")
    for module in (trainer.config.groups, trainer.config.composition):
        monkeypatch.setattr(module, "CONFIG_FOLDER", folder)
    return folder / "exp" / "theirs.yaml"


# Each name stands for nine of those before: 320 bytes, and a billion values.
BOMB = "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in itertools.pairwise("abcdefghij")
)
SECRET = "h1dden"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"train:\n  seed: " + b"7" * 5000, "a number of 5000 digits"),
        (b"train:\n  seed: 0x" + b"f" * 5000, "train.seed=… must lie between"),
        (b"train:\n  seed: " + b"1:" * 300 + b"0.5", "a number of 603 digits"),
        (b"train:\n  seed: .nan", "train.seed=nan must be a finite number"),
        (b"train:\n  seed: " + b"[" * 3000 + b"]" * 3000, "nested too deep"),
        (b"train: &a\n  seed: *a", "an anchor or an alias"),
        (b"a: &a [x]\n" + BOMB.encode(), "an anchor or an alias"),
        (b"#" * 2**17, "131092 bytes, more than 65536"),
        (b"train: [" + b"1," * 5000 + b"]", "more than 4096 values"),
        (b"\xff\xfe\x80", "utf-8"),
        (b"train:\n  seed: !!binary aGk=", "line 3 has a tag"),
        (b"train:\n  seed: !!set {1}", "line 3 has a tag"),
        (b"train:\n  seed: !!python/object/apply:os.abort []", "line 3 has a tag"),
        (b"train:\n  seed: 2001-01-01", "train.seed='2001-01-01' must be a whole number"),
        (b"5", "no file of settings"),
        (b"[5]", "no mapping of settings"),
        (b"5: 6", "no mapping of settings"),
        (b"hydra: null", "settings of hydra"),
        (b"hydra:\n  job:\n    env_copy: [PIN]", "settings of hydra"),
        (b"# @package hydra.job\nenv_copy: [PIN]", "a header other than"),
        (b"loader: null", "loader=None must be a group of settings"),
        (b"loader: x", "loader='x' must be a group of settings"),
        (b"loader:\n  max_bad_share: 0.0${oc.env:PIN}", "loader.max_bad_share=0.0${oc.env:PIN}"),
        (b"run: " + b"${home}" * 17, "at most 16 values from other settings"),
        (b"run: ${home.more}", "home"),
        (b"run: ${run}", "Recursive interpolation"),
        *(
            (b"defaults: " + defaults, "its defaults have")
            for defaults in (
                *(b"[{5: 6}]", b"[5]", b"5", b"{}", b"[[x]]", b"[null]", b"[{}]"),
                *(b"['override /model: ${oc.env:PIN}']", b"[{override /model: '${oc.env:PIN}'}]"),
                *(b"[{override /model: null}]", b"[../../elsewhere]", b"[/exp/../model/s_2]"),
                *(b"['/exp/digits@hydra.job']", b"[{override /hydra/launcher: x}]"),
                *(b"[{'/model@data': s_2}]", b"[{model: s_2}]", b"[optional missing]"),
            )
        ),
    ],
)
def test_an_experiment_of_somebody_else_is_refused_in_a_line(theirs, monkeypatch, content, reason):
    monkeypatch.setenv("PIN", SECRET)
    theirs.write_bytes(b"# @package _global_\n" + content)
    error = refusal(lambda: compose_job(["+exp=theirs"]))
    assert error is not None
    assert reason in error
    assert "\n" not in error
    assert SECRET not in error


GLOBAL = "# @package _global_\n"
LATER = ("#@todo", "# @todo tune the rate", "# @me: ask", "# @package hydra.job")


@pytest.mark.parametrize("comment", LATER)
def test_a_comment_with_an_at_is_a_comment(theirs, comment):
    for text in (
        f"{GLOBAL}# of mine\n{comment}\n",
        f"{GLOBAL}train: {{seed: 7}}\n{comment}\n\n    {comment}\n",
        f"{GLOBAL}---\n{comment}",
    ):
        theirs.write_text(text)
        assert compose_job(["+exp=theirs"]).train.seed == (7 if "seed" in text else 0)


SPACES = ("", " ", "  ", "\t", "\n", "\r\n", "\u2028", "\x0b", "\ufeff", "#", "@", "# @")
WORDS = ("package", "_global_", "_group_", "todo", "by:me", "x", "run: x")


@given(st.lists(st.sampled_from([*SPACES, *WORDS, GLOBAL]), max_size=9).map("".join))
@settings(max_examples=300, deadline=None)
def test_headers_are_those_that_hydra_reads(text):
    try:
        package = ConfigSource._get_header_dict(text)["package"]
    except ValueError:
        package = "unreadable"
    try:
        _check_header(text)
    except DocumentError:
        assert package not in (None, "_global_") or text.count("package") > 1
    else:
        assert package in (None, "_global_")


def test_a_header_that_hydra_cannot_read_is_refused_with_the_way_out(theirs):
    theirs.write_text(f"{GLOBAL}# @todo tune the rate\ntrain: {{seed: 7}}\n")
    error = refusal(lambda: compose_job(["+exp=theirs"])) or ""
    assert "comment '# @todo tune the rate' for a header; put that below the first" in error


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_an_experiment_that_never_ends_is_refused_unread(theirs, make):
    make(theirs)
    assert "no regular file" in (refusal(lambda: compose_job(["+exp=theirs"])) or "")


def test_an_experiment_of_somebody_else_is_refused_by_what_it_takes_up(theirs):
    theirs.write_text("# @package _global_\ndefaults: [between]\n")
    theirs.with_name("between.yaml").write_text("defaults: [{override /optim: theirs}]\n")
    (theirs.parents[1] / "optim" / "theirs.yaml").write_text("beta1: !!python/name:os.abort\n")
    assert "optim/theirs.yaml is no file of settings: line 1 has a tag" in (
        refusal(lambda: compose_job(["+exp=theirs"])) or ""
    )


def test_what_is_typed_is_taken_though_it_is_the_default(theirs, monkeypatch):
    theirs.write_text(
        "# @package _global_\ndefaults:\n  - override /model: digits\nrun: theirs\nhome: /theirs\n"
    )
    monkeypatch.setenv("LAPFLOW_HOME", "/elsewhere")
    monkeypatch.setenv("HOME", "/somebody")
    given = compose_job(["+exp=theirs"])
    assert (given.run, given.home) == ("theirs", "/theirs")
    for experiment in ("+exp=theirs", DIGITS):
        typed = compose_job([experiment, "run=run", "home=~/lapflow"])
        assert (typed.run, typed.home) == ("run", "/somebody/lapflow")


def test_a_command_reads_no_environment_either():
    with pytest.raises(ConfigError, match="environment"):
        parse_words(SampleConfig, ["checkpoint=/a/b", "output=${oc.env:HOME}"])


def test_a_setting_can_be_another_ones_value():
    job = compose_job([DIGITS, "run=a-${train.seed}", "train.seed=3", "tracking.experiment=${run}"])
    assert (job.run, job.tracking.experiment) == ("a-3", "a-3")


HEAVY = {"torch", "numpy", "hydra", "pydantic", "streaming", "ray", "mlflow", "PIL"}
LOADED = """
import sys
from trainer.launch import main
try:
    code = main(sys.argv[1:])
except SystemExit as leaving:
    code = leaving.code
print(code, *sorted({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["+exp=nope"], "2"),
        (["model=b_2"], "2"),
        ([DIGITS, "model=nope"], "2"),
        (["-m", "+exp=digits,nope", "train.seed=0,1"], "2"),
        (["--help"], "0"),
    ],
)
def test_a_name_that_does_not_exist_costs_no_imports(words, code):
    ended = subprocess.run(
        [sys.executable, "-c", LOADED, *words], capture_output=True, text=True, check=True
    )
    got, *modules = ended.stdout.splitlines()[-1].split()
    assert got == code
    assert HEAVY & {*modules} == set()


def test_one_run_is_no_sweep(capsys):
    assert main(["-m", DIGITS, "train.seed=0"]) == 2
    assert "as in train.seed=0,1,2" in capsys.readouterr().err
    assert main([DIGITS, "--jobs", "2"]) == 2
    assert "give --multirun too" in capsys.readouterr().err


def test_a_sweep_with_a_run_that_cannot_be_is_refused_before_the_first_one(capsys):
    assert main(["-m", DIGITS, "train.global_batch=128,7"]) == 2
    told = capsys.readouterr()
    assert "run digits-global_batch-7 of this sweep: train.global_batch=7" in told.err
    assert told.out == ""
