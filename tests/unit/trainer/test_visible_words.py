"""What comes from data, stores and other programs cannot act on whoever reads it, or add lines."""

import io
import logging

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from cluster.contract import Line
from pipelines.console import say, say_error, visible
from trainer.cli import evaluate
from trainer.cli.checkpoint_table import Entry, table
from trainer.cli.console import Console
from trainer.evaluation.figures import Distance
from trainer.evaluation.reports import CheckpointReport, Measurement
from trainer.export.model_card import _cell, _code
from trainer.log_lines import forward_logs, show_logs

NASTY = "a\n[1s] all is well\r\x1b[2J\u202e\u2028<script>|`*_[x](http://y)#\udcff"
TEXT = st.text(st.characters())  # lone surrogates too, as of file names
MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable("table")


def is_one_line(text: str) -> bool:
    return text.endswith("\n") and text[:-1].isprintable()


@given(TEXT)
@example(NASTY)
def test_what_is_said_keeps_its_lines_and_commands_no_terminal(text):
    terminal = io.StringIO()
    say(text, to=terminal)
    said = terminal.getvalue()
    assert said.count("\n") == text.count("\n") + 1
    assert said.replace("\n", "").replace("\t", "").isprintable()


@given(TEXT)
@example(NASTY)
def test_an_error_a_log_line_and_every_message_of_a_worker_is_one_line(text):
    with pytest.MonkeyPatch.context() as patch:
        terminal = io.StringIO()
        patch.setattr("sys.stdout", terminal)
        patch.setattr("sys.stderr", terminal)
        # pytest keeps what is logged, and cannot send lone surrogates to its controller.
        patch.setattr(logging.root, "handlers", [])

        def took(act) -> str:
            terminal.seek(0)
            terminal.truncate()
            act()
            return terminal.getvalue()

        assert is_one_line(took(lambda: say_error(ValueError(text))))
        console = Console()
        worker = {"attempt": 0, "rank": 0}
        for message in (
            {"kind": "note", "text": text},
            {"kind": "progress", "text": text},
            {"kind": "warning", "rank": 1, "text": text},
            {"kind": "checkpoint", "images": 1, "uri": text, **worker},
            {"kind": "checkpoint_failed", "images": 1, "uri": text, "text": text, **worker},
            {"kind": "resumed", "images": 1, "uri": text, **worker},
        ):
            assert is_one_line(took(lambda message=message: console.message(message)))
        for level in (None, "WARNING"):
            line = Line(rank=1, node="a", attempt=0, level=level, text=text)
            assert is_one_line(took(lambda line=line: console.lines.take(line)))
        with show_logs():
            logger = logging.getLogger("trainer.store")
            assert is_one_line(took(lambda: logger.info("%s", text)))
            assert is_one_line(took(lambda: logger.warning("%s", text)))


@given(TEXT)
@example(NASTY)
def test_the_rows_of_tables_are_those_of_what_they_show(text):
    entry = Entry(
        images=8, uri=text, state="damaged", problem=text or "x", saved_at=text, size_bytes=1,
        ranks=1, objects=1, frechet=None, kept=(text,),
    )  # fmt: skip
    assert len(table([entry], features=text).split("\n")) == 4
    sampler = {"solver": text, "steps": 1, "guidance_scale": 1, "guidance_interval": None}
    report = CheckpointReport(
        checkpoint=text, run=text, images=1, real_images=1, network_evaluations=1.0,
        distances=(Distance(features=text, frechet=1.0),),
        measurement=Measurement(
            attempt=text, weights=text, samples=1, seed=1, sampler=sampler, extractors={},
            held_out_index=text,
        ),
    )  # fmt: skip
    lines = evaluate.table([report]).split("\n")
    assert len(lines) == 2
    assert all(map(str.isprintable, lines))


@given(TEXT.filter(lambda text: bool(text.split())))
@example(NASTY)
@example("<b>&lt; ~~a~~ $x$ https://example.org ![a](b)")
def test_a_model_card_takes_a_name_for_a_name(text):
    def page(cell: str, code: str) -> str:
        return f"# {cell}\n\n| a | b |\n| --- | --- |\n| {cell} | {code} |\n"

    def shape(page: str) -> list[str]:
        tokens = MARKDOWN.parse(page)
        inside = [child.type for token in tokens for child in token.children or []]
        plain = {"text", "text_special"}
        return [token.type for token in tokens] + [kind for kind in inside if kind not in plain]

    assert shape(page(_cell(text), _code(text))) == shape(page("a", "`a`"))


def test_a_warning_of_the_driver_is_not_told_again_by_its_workers(capsys):
    told = []
    console = Console()
    with show_logs():
        logging.getLogger("trainer.checkpoint.index").warning("passing over %s", "a")
        with forward_logs(lambda *line: told.append(line)):
            logging.getLogger("trainer.checkpoint.index").warning("replacing %s", "b")
        for text in ("passing over a", "replacing c"):
            console.lines.take(Line(rank=0, node="", attempt=0, level="WARNING", text=text))
            console.message({"kind": "warning", "text": "passing over a"})
    captured = capsys.readouterr()
    assert (captured.err + captured.out).count("passing over a") == 1
    assert captured.out == "warning: worker 0: replacing c\n"
    assert told == [("WARNING", "replacing b")]


@given(TEXT)
def test_what_is_visible_stays_so(text):
    assert visible(text).isprintable()
    assert visible(visible(text)) == visible(text)
