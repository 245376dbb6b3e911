"""Words with several values, and the runs that they stand for; nothing is trained."""

from __future__ import annotations

import pytest

from tests.support.job import ROOT
from trainer.cli import launch
from trainer.cli.command import TO_LEAVE_S
from trainer.cli.jobs import _needs
from trainer.config.groups import members
from trainer.config.job import JobConfig
from trainer.config.overrides import MAX_POINTS, parse_override, swept_words
from trainer.config.reading import ConfigError
from trainer.config.sweeps import _all_of, expand_sweep
from trainer.training.validate import _check_name


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("train.seed=0,1, 2", ["0", "1", "2"]),
        ("train.seed=range(3)", ["0", "1", "2"]),
        ("train.seed=range(1,7,3)", ["1", "4"]),
        ("train.seed=choice(5,7)", ["5", "7"]),
        ("train.seed=3", ["3"]),
        ("optim.learning_rate=1e-3,2e-4", ["1e-3", "2e-4"]),
        ("flow.critical_times=[0.1],[0.3,0.6]", ["[0.1]", "[0.3,0.6]"]),
        ("run=it's,one", ["it's,one"]),
        ("data.prefix=~/a,s3://b/c=(d)", ["~/a", "s3://b/c=(d)"]),
        ('data.prefix="~/a,b",~/c', ['"~/a,b"', "~/c"]),
        ("data.prefix=~/a=(b)", ["~/a=(b)"]),
        ("run=digits-${train.seed}", ["digits-${train.seed}"]),
        ("+exp=glob(ablation/three*)", ["ablation/three_scales"]),
        ("model=glob([s_*,b_*],exclude=*_4)", ["b_2", "s_2"]),
    ],
)
def test_a_word_gives_one_value_or_several(word, values):
    key = word.partition("=")[0]
    assert swept_words(word) == [f"{key}={value}" for value in values]


def test_a_glob_finds_all_members():
    assert swept_words("+exp=glob(*)") == [f"+exp={name}" for name in members("exp")]


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("train.seed=range(1000000000)", f"more than {MAX_POINTS:,}"),
        ("optim.learning_rate=interval(0,1)", "cannot be counted"),
        ("train.seed=glob(*)", "only members of groups"),
        ("+exp=glob(nothing*)", "gives none"),
    ],
)
def test_values_that_make_no_runs_are_refused(word, part):
    with pytest.raises(ConfigError, match=part):
        swept_words(word)


def test_several_values_for_one_run_are_refused_with_the_way_to_several():
    with pytest.raises(ConfigError, match=r"trainer\.launch -m … train\.seed=0,1"):
        parse_override("train.seed=0,1", JobConfig)


def names(*words: str) -> tuple[str, list[str]]:
    sweep = expand_sweep(words)
    return sweep.name, [point.job.run for point in sweep.points]


def test_runs_and_sweep_are_named_after_what_varies():
    assert names("+exp=ablation/gvp,ablation/one_scale") == (
        "ablation",
        ["ablation-gvp", "ablation-one_scale"],
    )
    assert names("+exp=digits", "train.seed=0,1") == (
        "digits-seed",
        ["digits-seed-0", "digits-seed-1"],
    )
    assert names("+exp=digits", "run=mine", "train.seed=0,1") == (
        "mine-seed",
        ["mine-seed-0", "mine-seed-1"],
    )
    assert names("+exp=digits", "run='n${train.seed}'", "train.seed=0,1")[1] == ["n0", "n1"]
    assert names("+exp=digits", "run=a,b") == ("digits-run", ["a", "b"])
    assert names("+exp=cifar10,ablation/gvp", "tracking.sweep=table2")[0] == "table2"
    assert names("+exp=digits", "flow=one_scale,two_scales", "optim.learning_rate=1e-3,1e-4") == (
        "digits-flow-learning_rate",
        [
            *(
                "digits-flow-one_scale-learning_rate-1e-3",
                "digits-flow-one_scale-learning_rate-1e-4",
            ),
            *("digits-flow-two_scales-learning_rate-1e-3",),
            *("digits-flow-two_scales-learning_rate-1e-4",),
        ],
    )


def test_sweeps_of_different_experiments_are_not_called_alike():
    """One name is one lease, one table and one parent in MLflow."""
    assert names("+exp=digits,cifar10")[0] == "cifar10-digits"
    assert names("+exp=cifar10,ablation/gvp", "train.seed=0,1")[0] == "ablation-gvp-cifar10-seed"
    assert _all_of(["cifar10", "ablation/gvp"]) == _all_of(["ablation/gvp", "cifar10"])
    every = members("exp")
    assert _all_of(every) != _all_of(every[1:]) != _all_of(every[:-1])
    _check_name("tracking.sweep", f"{_all_of(every)}-learning_rate-seed")


@pytest.mark.parametrize(
    "word",
    [
        "optim.learning_rate=1e+0,1e-3",
        "eval.reference=a=b.npz,c@d.npz",
        "flow.critical_times=[0.1],[0.3]",
    ],
)
def test_names_of_runs_are_names_of_folders(word):
    for run in names("+exp=digits", word)[1]:
        _check_name("run", run)


def test_keys_of_the_same_last_part_are_told_in_full():
    _, runs = names("+exp=digits", "train.seed=0,1", "eval.seed=0,1")
    assert runs[0] == "digits-train.seed-0-eval.seed-0"


def test_the_words_of_a_point_make_its_run():
    sweep = expand_sweep(["+exp=digits", "train.seed=0,1", "model.width=32"])
    first, second = sweep.points
    assert second.words == (
        *("+exp=digits", "train.seed=1", "model.width=32"),
        *("tracking.sweep=digits-seed", "run=digits-seed-1"),
    )
    assert second.varied == {"train.seed": "1"}
    assert (second.job.train.seed, second.job.model.width) == (1, 32)
    assert second.job.tracking.sweep == "digits-seed"
    assert first.job.train.seed == 0


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["+exp=digits", "train.seed=0,1,0"], "train.seed=0 is given twice"),
        (["+exp=digits", "eval.reference=a b.npz,a_b.npz"], "the name of two runs"),
        (["+exp=digits", "run=${data.name}", "train.seed=0,1"], "the name of two runs"),
        (["+exp=digits", "train.seed=range(100)", "eval.seed=range(100)"], "10,000 runs"),
    ],
)
def test_runs_that_cannot_be_told_apart_or_are_too_many_are_refused(words, part):
    with pytest.raises(ConfigError, match=part):
        expand_sweep(words)


@pytest.mark.parametrize("word", ["two", "0", "-1"])
def test_what_is_no_number_of_jobs_is_refused_with_what_is(word, capsys):
    with pytest.raises(SystemExit):
        launch._parser().parse_args(["--jobs", word])
    assert f"{word!r} is no number of jobs; give 1 or more" in capsys.readouterr().err


def test_a_sweep_can_be_sent_to_a_cluster_as_one_job():
    command = ["python", "-m", "trainer.launch", "-m", "+exp=digits", "train.seed=0,1"]
    grace_s, metadata, name = _needs([*command, "checkpoint.grace_s=100,200"], str(ROOT))
    assert (grace_s, metadata, name) == (200 + TO_LEAVE_S, {}, None)


def test_the_ablations_are_one_sweep():
    sweep = expand_sweep(["+exp=glob([ablation/*,celeba_hq_256])"])
    assert len(sweep.points) == len(members("exp/ablation")) + 1
    assert {point.job.eval.samples for point in sweep.points} == {2000}
