"""What is said to nobody costs nothing: the program goes on and ends with its own exit code."""

import os
import subprocess
import sys

import pytest

SPEAKER = """
import logging, sys
from pipelines.console import SayingHandler, say
logging.basicConfig(handlers=[SayingHandler()])
for number in range(50):
    say(f"line {number} " + "é→" * 500)
    logging.warning("warning %d", number)
with open(sys.argv[1], "w") as file:
    file.write("went on")
sys.exit(7)
"""


def run_speaker(tmp_path, command):
    done = tmp_path / "done"
    words = [sys.executable, "-c", SPEAKER, str(done)]
    code = subprocess.run(["bash", "-c", command, "bash", *words], check=False).returncode
    return code, done.exists()


@pytest.mark.parametrize(
    "command",
    [
        '"$@" | true; exit ${PIPESTATUS[0]}',
        '"$@" 2>&1 | true; exit ${PIPESTATUS[0]}',
        '"$@" >&- 2>&-',
        '"$@" > /dev/full 2>&1',
    ],
)
def test_a_console_that_is_gone_or_full_ends_nothing(tmp_path, command):
    assert run_speaker(tmp_path, command) == (7, True)


def test_a_console_that_has_room_again_gets_the_next_line():
    script = """
import os, sys
from pipelines.console import say
kept = os.dup(1)
os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
say("lost")
os.dup2(kept, 1)
say("kept")
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert run.stdout == b"kept\n"
    assert run.stderr == b""


def test_characters_that_the_encoding_lacks_are_escaped():
    script = "from pipelines.console import say; say('Fréchet \\udcff')"
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=True,
    )
    assert run.stdout == b"Fr\\xe9chet \\udcff\n"
