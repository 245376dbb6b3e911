"""A bar on a terminal, lines elsewhere; neither is ended, or commanded, by what it is shown on."""

import os
import pty
import re
import subprocess
import sys

import pytest

from pipelines.progress import Pace, Progress, figures_in

# Counts ten images, says a line in between, and ends with a code of its own.
COUNTING = r"""
import sys, time
from pipelines.console import say, speak_as_command
from pipelines.progress import Progress, figures_in

def line(pace):
    return f"{pace.done:.0f} of {pace.total} counted"

with speak_as_command(quiet="quiet" in sys.argv):
    figures = figures_in("images")
    with Progress(
        "[red]tra\x1b[2Jin[/red]", 10, report=say, line=line, figures=figures, every_s=0.0
    ) as progress:
        for number in range(10):
            time.sleep(0.05)
            progress.add(1)
            if number == 4:
                say("[bold]between[/bold] " + 200 * "x")
        if "gone" in sys.argv:
            sys.stdin.read()
            for number in range(10):
                time.sleep(0.1)
                say("to nobody")
    say("warning: told in any case")
with open(sys.argv[1], "w") as file:
    file.write("went on")
sys.exit(7)
"""
LINES = [
    *(f"{number} of 10 counted" for number in range(1, 6)),
    "[bold]between[/bold] " + 200 * "x",
    *(f"{number} of 10 counted" for number in range(6, 11)),
    "warning: told in any case",
]


def counted(tmp_path, *more: str, script=COUNTING, **variables: str) -> tuple[str, int, bool]:
    """What the terminal of a process got, its exit code, and whether it came to its end."""
    ours, theirs = pty.openpty()
    done = tmp_path / "done"
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(done), *more],
        env={**os.environ, "TERM": "xterm", "CI": "", "COLUMNS": "100", **variables},
        stdin=subprocess.PIPE,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            read = os.read(ours, 1 << 16)
        except OSError:  # what Linux says at the end of a terminal
            break
        shown += read
        if not read or ("gone" in more and b"100%" in shown):
            break
    os.close(ours)
    assert process.stdin is not None
    process.stdin.close()
    return shown.decode(), process.wait(), done.exists()


def test_a_terminal_shows_a_bar_with_rate_and_time_and_lines_above_it(tmp_path):
    shown, *ended = counted(tmp_path)
    assert ended == [7, True]
    assert "━" in shown
    # What is counted is named as it is, and can neither colour nor clear the screen.
    assert r"[red]tra\x1b[2Jin[/red]" in shown
    assert "\x1b[2J" not in shown
    assert re.search(r"100%  [\d.]+ images/s  ETA 0s", shown)
    lines = [line for line in shown.splitlines() if "counted" in line]
    assert len(lines) == 1
    assert lines[0].endswith("10 of 10 counted")
    # Above the bar, whole: the terminal breaks it where it is wide enough.
    assert "[bold]between[/bold] " + 200 * "x" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("━")


def test_a_bar_has_the_characters_that_the_terminal_has(tmp_path):
    shown, *ended = counted(
        tmp_path, script=COUNTING.replace("tra", "é→"), PYTHONIOENCODING="ascii"
    )
    assert ended == [7, True]
    assert r"\xe9\u2192" in shown
    assert shown.isascii()


@pytest.mark.parametrize("variables", [{"TERM": "dumb"}, {"CI": "true"}])
def test_what_is_no_terminal_for_people_gets_lines(tmp_path, variables):
    shown, *ended = counted(tmp_path, **variables)
    assert ended == [7, True]
    assert shown.splitlines() == LINES


def test_a_process_that_is_no_command_shows_no_bar_on_the_terminal_that_it_inherits(tmp_path):
    script = COUNTING.replace('speak_as_command(quiet="quiet" in sys.argv)', "nullcontext()")
    shown, *ended = counted(tmp_path, script=f"from contextlib import nullcontext\n{script}")
    assert ended == [7, True]
    assert shown.splitlines() == LINES


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_pipe_gets_lines_whatever_the_other_stream_is(tmp_path, stream):
    ours, theirs = pty.openpty()
    streams = {"stdout": theirs, "stderr": theirs, stream: subprocess.PIPE}
    done = subprocess.run(
        [sys.executable, "-c", COUNTING, str(tmp_path / "done")],
        env={**os.environ, "TERM": "xterm", "CI": ""},
        check=False,
        **streams,
    )
    os.close(theirs)
    shown = done.stdout if stream == "stdout" else os.read(ours, 1 << 16)
    os.close(ours)
    assert done.returncode == 7
    assert shown.decode().splitlines() == LINES


def test_quiet_shows_warnings_alone(tmp_path):
    shown, *ended = counted(tmp_path, "quiet")
    assert ended == [7, True]
    assert shown.splitlines() == LINES[-1:]


@pytest.mark.slow
def test_a_terminal_that_is_closed_ends_nothing(tmp_path):
    script = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + COUNTING
    shown, *ended = counted(tmp_path, "gone", script=script)
    assert "━" in shown
    assert ended == [7, True]


def test_lines_come_so_often_and_the_rate_is_that_of_what_is_fresh(monkeypatch):
    now, lines = [100.0], list[str]()
    monkeypatch.setattr("pipelines.progress.time.monotonic", lambda: now[0])

    def line(pace: Pace) -> str:
        return f"{pace.done:g} {pace.fraction:.0%} {pace.rate:g}/s {pace.left_s:g} s"

    def progress(**more: bool) -> Progress:
        lines.clear()
        figures = figures_in("images")
        put = lines.append
        return Progress("x", 40, report=put, line=line, figures=figures, every_s=10, **more)

    with progress() as counting:
        counting.add(20, fresh=False)
        for _ in range(5):
            now[0] += 4
            counting.add(4)
        assert (counting.done, counting.figures()) == (40, "100%  1.0 images/s  ETA 0s")
    assert lines == ["32 80% 1/s 8 s", "40 100% 1/s 0 s"]
    with progress(last=False) as counting:
        assert counting.figures() == "  0%"
        for _ in range(4):
            now[0] += 5
            counting.add(10)
    assert lines == ["20 50% 2/s 10 s"]
