"""The commands of the ingest say what they take, how far they are, and when they will be done."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.ingest.__main__ import main
from pipelines.ingest.write import LabelledImage, write_dataset
from tests.unit.pipelines import pictures

COMMANDS = ("image-folder", "huggingface", "digits", "verify")
ROOT = Path(__file__).parents[3]


def test_help_lists_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    listed = re.findall(r"^    ([a-z-]+)  +\w", capsys.readouterr().out, flags=re.MULTILINE)
    assert tuple(listed) == COMMANDS


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("image-folder", "--hold-out --image-size --encoding --workers --split --classes --seed"),
        ("huggingface", "--hold-out --image-size --split --image-column --label-column --revision"),
        ("digits", "--seed"),
        ("verify", "--workers --forbid-duplicates --json"),
    ],
)
def test_every_command_explains_itself(
    command: str, options: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    said = capsys.readouterr().out
    assert said.startswith(f"usage: python -m pipelines.ingest {command}")
    for option in options.split():
        assert option in said
    assert "prefix" in said


@pytest.mark.parametrize(
    "words", [[], ["unpack"], ["verify"], ["verify", "x", "--fast"], ["digits", "x", "--seed", "a"]]
)
def test_words_that_are_no_command_are_a_usage_error(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert "usage: python -m pipelines.ingest" in capsys.readouterr().err


def test_the_old_name_of_an_option_is_understood_and_the_new_one_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["image-folder", str(tmp_path), str(tmp_path / "out"), "--max-skipped-share", "2"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "note: --max-skipped-share is called --max-skipped-fraction now" in said
    assert "max_skipped_fraction=2.0 must lie in [0, 1]" in said


def test_progress_is_told_with_the_time_that_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipelines.ingest.plan._REPORT_EVERY_S", 0.0)
    (tmp_path / "pictures" / "cat").mkdir(parents=True)
    for number in range(4):
        # Half a MiB each, so that there are two shards.
        data = pictures.png(420, 420, seed=number)
        assert 2**18 < len(data) < 2**20
        (tmp_path / "pictures" / "cat" / f"{number}.png").write_bytes(data)
    command = ["image-folder", str(tmp_path / "pictures"), str(tmp_path / "out")]
    assert main([*command, "--shard-mib", "1", "--workers", "1"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "%" in line]
    assert len(lines) > 1
    pattern = r".*: \d images \((\d+)%\), 0 skipped, [\d.]+ MiB/s, about (\d+) s left"
    told = [re.fullmatch(pattern, line) for line in lines]
    assert all(told)
    shares = [int(match[1]) for match in told if match]
    assert shares == sorted(set(shares))
    assert shares[-1] == 100
    assert lines[-1].endswith("about 0 s left")


@pytest.mark.slow
def test_the_exit_status_is_that_of_the_process(tmp_path: Path) -> None:
    images = [LabelledImage(data, 0) for data in (pictures.png(), b"no image")]
    write_dataset(images, str(tmp_path / "bad"))
    command = [sys.executable, "-m", "pipelines.ingest", "verify", str(tmp_path / "bad")]
    done = subprocess.run(
        [*command, "--workers", "1"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.endswith("BAD: 1 images cannot be used\n")


@pytest.mark.slow
def test_what_is_logged_cannot_command_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.png").write_bytes(pictures.png(8, 8))
    (tmp_path / "in" / "2.png").write_bytes(b"no image")
    out = tmp_path / "out\nERROR of nobody\x9b"
    words = ["image-folder", str(tmp_path / "in"), str(out), "--image-size", "8", "--workers", "1"]
    assert main(words) == 2  # too many are damaged; what is finished is kept
    (record,) = (out / ".train.building").glob("*.record")
    record.write_bytes(b"{}")
    command = [sys.executable, "-m", "pipelines.ingest", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    warning, error = done.stderr.splitlines()
    assert warning.startswith("WARNING pipelines.ingest.write: writing a shard again")
    assert error.startswith("error: 1 of 2 images")
    assert (warning + error).isprintable()
