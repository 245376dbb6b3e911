"""Writes docs/settings.md from the configuration dataclasses: `python -m docs.settings_page`."""

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.cli.checkpoints import ExportConfig, PruneConfig, VerifyConfig
from trainer.cli.drawing_config import InpaintConfig, SampleConfig
from trainer.cli.report import ReportConfig
from trainer.cli.run_handle import RetentionSettings
from trainer.cli.settings_page import format_value, kind_of
from trainer.cli.track import ShipConfig
from trainer.cli.ui import UiConfig
from trainer.config.job import JobConfig
from trainer.config.settings import MISSING, Setting, settings_of
from trainer.evaluation.config import CheckpointEvaluationConfig

PAGE = Path(__file__).parent / "settings.md"

COMMANDS: dict[str, type[Any]] = {
    "python -m trainer.launch, python -m trainer.plan": JobConfig,
    "python -m trainer.sample": SampleConfig,
    "python -m trainer.inpaint": InpaintConfig,
    "python -m trainer.evaluate": CheckpointEvaluationConfig,
    "python -m trainer.checkpoints list": RetentionSettings,
    "python -m trainer.checkpoints verify": VerifyConfig,
    "python -m trainer.checkpoints prune": PruneConfig,
    "python -m trainer.checkpoints export": ExportConfig,
    "python -m trainer.ui": UiConfig,
    "python -m trainer.track ship": ShipConfig,
    "python -m trainer.report": ReportConfig,
}

_HEAD = """\
# Settings

`python -m docs.settings_page` writes this page from the configuration dataclasses, and a test holds
it to them. Each line gives a setting, what it can be, and its default; `null` is None. Experiments
and groups under `configs/` give others: `python -m trainer.launch +exp=digits --cfg job` shows all
values of one, and `--explain KEY` explains one setting.
"""
_WIDTH = 120


def page() -> str:
    """Render the page."""
    parts = [_HEAD]
    for command, kind in COMMANDS.items():
        names = ", ".join(f"`{name}`" for name in command.split(", "))
        parts += [f"## {names}\n", *_entries(kind)]
    return "\n".join(parts)


def _entries(kind: type[Any]) -> Iterator[str]:
    """Yield the settings: those of the command itself, then each group below its meaning."""
    settings = list(settings_of(kind))
    own = [each for each in settings if "." not in each.key and not each.is_group]
    if own:
        yield "\n".join([*map(_item, own), ""])
    for group in (each for each in settings if "." not in each.key and each.is_group):
        held = [each for each in settings if each.key.startswith(f"{group.key}.")]
        yield f"### `{group.key}`\n\n{_plain(group.meaning)}\n"
        yield "\n".join([*map(_item, held), ""])


def _item(setting: Setting) -> str:
    kind = ""
    if not setting.is_group:
        default = (
            "must be given" if setting.default == MISSING else f"`{format_value(setting.default)}`"
        )
        kind = f" ({kind_of(setting.wanted)}; {default})"
    text = f"- `{setting.key}`{kind}: {_plain(setting.meaning)}"
    return textwrap.fill(
        text, _WIDTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
    )


def _plain(meaning: str) -> str:
    """Keep Markdown from reading signs that stand for themselves, outside of code."""
    pieces = meaning.split("`")
    return "`".join(
        piece.replace("*", r"\*").replace("<", r"\<") if number % 2 == 0 else piece
        for number, piece in enumerate(pieces)
    )


if __name__ == "__main__":
    PAGE.write_text(page())
