"""A setting that was renamed is still understood by its old name, and the new one is told."""

import shutil

import pytest

import trainer.config.composition
import trainer.config.groups
from tests.support.configuration import configuration
from trainer.config.composition import compose_job
from trainer.config.job import JobConfig, fingerprinted, science
from trainer.config.reading import from_dict, to_dict
from trainer.config.renamed import RENAMED
from trainer.config.settings import settings_of
from trainer.training.validate import validate

DIGITS = "+exp=digits"
OLD, NEW = "loader.max_bad_share", "loader.max_bad_fraction"
THEIRS = """# @package _global_
defaults:
  - override /model: digits

loader:
  max_bad_share: 0.25
"""


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """An experiment file from before the renaming."""
    folder = shutil.copytree(trainer.config.groups.CONFIG_FOLDER, tmp_path / "configs")
    for module in (trainer.config.groups, trainer.config.composition):
        monkeypatch.setattr(module, "CONFIG_FOLDER", folder)
    (folder / "exp" / "theirs.yaml").write_text(THEIRS)
    return "+exp=theirs"


def test_what_is_renamed_was_a_setting_and_its_new_name_is_one():
    known = {setting.key for setting in settings_of(JobConfig)}
    assert not known & set(RENAMED)
    assert known.issuperset(RENAMED.values())


def test_no_name_that_is_fingerprinted_changes():
    settings = fingerprinted(science(configuration(DIGITS), data_digest="digest"))
    for key in RENAMED.values():
        group, _, name = key.partition(".")
        assert name.partition(".")[0] not in settings.get(group, {})


def test_an_old_name_on_the_command_line_sets_the_new_one_and_says_so(caplog):
    assert compose_job([DIGITS, f"{OLD}=0.5"]).loader.max_bad_fraction == 0.5
    assert f"{OLD} is called {NEW} now" in caplog.text


def test_a_mistake_is_told_of_the_new_name():
    with pytest.raises(ValueError, match=r"max_bad_fraction=2\.0|loader: max_bad_fraction"):
        validate(compose_job([DIGITS, f"{OLD}=2.0"]))


def test_an_old_name_in_an_experiment_file_sets_the_new_one_and_says_so(theirs, caplog):
    assert compose_job([theirs]).loader.max_bad_fraction == 0.25
    assert f"{OLD} is called {NEW} now" in caplog.text


@pytest.mark.parametrize("key", [OLD, NEW])
def test_the_command_line_wins_over_an_old_name_in_a_file(theirs, key):
    assert compose_job([theirs, f"{key}=0.5"]).loader.max_bad_fraction == 0.5


def test_new_names_are_told_nothing(caplog):
    assert compose_job([DIGITS, f"{NEW}=0.5"]).loader.max_bad_fraction == 0.5
    assert not caplog.text


def test_recorded_settings_are_read_by_their_old_names_without_a_word(caplog):
    job = configuration(DIGITS, f"{NEW}=0.5")
    recorded = to_dict(job)
    recorded["loader"]["max_bad_share"] = recorded["loader"].pop("max_bad_fraction")
    assert from_dict(JobConfig, recorded) == job
    assert from_dict(type(job.loader), recorded["loader"], path="loader.") == job.loader
    assert not caplog.text
    assert "max_bad_share" in recorded["loader"]  # what was given is left as it is
