"""Help says of every setting what it is, what it is by default, and what it can be."""

from typing import Any

import pytest
import yaml

from docs import settings_page
from tests.support.commands import GIVEN
from tests.support.configuration import configuration
from trainer.cli.checkpoints import ExportConfig
from trainer.cli.checkpoints import main as checkpoints
from trainer.cli.drawing_config import InpaintConfig, SampleConfig
from trainer.cli.inpaint import main as inpaint
from trainer.cli.launch import main as launch
from trainer.cli.run_handle import RetentionSettings
from trainer.cli.sample import main as sample
from trainer.config.composition import parse_words
from trainer.config.job import JobConfig
from trainer.config.reading import to_dict
from trainer.config.renamed import RENAMED
from trainer.config.settings import settings_of

DIGITS = "+exp=digits"


def shown(capsys: pytest.CaptureFixture[str], command: Any, *words: str) -> str:
    with pytest.raises(SystemExit) as left:
        command(list(words))
    told = capsys.readouterr()
    assert left.value.code == (0 if told.out else 2)
    return told.out + told.err


@pytest.mark.parametrize(
    ("command", "kind", "words"),
    [
        (sample, SampleConfig, []),
        (inpaint, InpaintConfig, []),
        (checkpoints, RetentionSettings, ["list"]),
        (checkpoints, ExportConfig, ["export"]),
    ],
)
def test_help_gives_every_setting_with_meaning_default_and_choices(capsys, command, kind, words):
    text = " ".join(shown(capsys, command, *words, "--help").split())
    for setting in settings_of(kind):
        assert setting.key in text
        assert setting.meaning
        assert " ".join(setting.meaning.split()) in text
        if len(setting.words) > 1:
            assert " | ".join(setting.words) in text
    if kind is SampleConfig:
        assert "sampler.guidance_scale=null (number)" in text
        assert "checkpoint=… (text, must be given)" in text


def test_one_setting_is_explained(capsys):
    assert "share" not in shown(capsys, launch, "--explain", "train.seed")
    assert "Threads that decode" in shown(capsys, launch, "--explain", "loader.decode_threads")
    assert "Newest valid" in shown(capsys, checkpoints, "prune", "--explain", "keep_last")
    group = shown(capsys, launch, "--explain", "optim")
    assert "optim.learning_rate=0.0001" in group
    assert "optim.final_ratio" in group
    assert "did you mean optim.learning_rate?" in shown(capsys, launch, "--explain", "optim.lr")
    for old, new in RENAMED.items():
        renamed = shown(capsys, launch, "--explain", old)
        assert f"  {new}=" in renamed
        assert f"{old} is called {new} now" in renamed


def test_the_whole_configuration_is_shown_with_its_meanings(capsys):
    assert launch([DIGITS, "--cfg", "job"]) == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text) == to_dict(configuration(DIGITS))
    comments = " ".join(line.strip(" #") for line in text.splitlines() if line.strip()[:1] == "#")
    for setting in settings_of(JobConfig):
        assert " ".join(setting.meaning.split()) in comments, setting.key


def test_defaults_of_a_command_win_over_those_of_a_part():
    read = parse_words(SampleConfig, ["checkpoint=/a/b", "output=/c.png"])
    assert read == SampleConfig(checkpoint="/a/b", output="/c.png")


def test_the_page_of_the_settings_is_as_the_dataclasses_are():
    assert set(settings_page.COMMANDS.values()) == set(GIVEN)
    assert settings_page.PAGE.read_text() == settings_page.page(), (
        "run: python -m docs.settings_page"
    )


def test_the_page_names_every_setting_with_its_meaning():
    text = " ".join(settings_page.PAGE.read_text().replace("\\", "").split())
    for kind in GIVEN:
        for setting in settings_of(kind):
            assert f"`{setting.key}`" in text
            assert " ".join(setting.meaning.split()) in text, setting.key
