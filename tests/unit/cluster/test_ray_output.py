"""What workers write reaches the driver once, however it is cut, lost on the way and read again."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import ray_output
from cluster.contract import Line
from cluster.ray_mailbox import Output, Seat, Started
from cluster.ray_output import OutputLog, OutputTail, Part, output_paths, read_parts


class Driver:
    """What a driver is told by its workers' lines."""

    def __init__(self, *paths: str, names_nodes: bool = True) -> None:
        self.lines: list[Line] = []
        self.log = OutputLog(self.lines.append, here="a", names_nodes=names_nodes)
        seat = Seat(node="a", address="10.0.0.1", host="one", pid=1, output=paths)
        self.log.begin(Started(0, (seat,)))

    @property
    def texts(self) -> list[str]:
        return [line.text for line in self.lines]


_PART = st.floats(0, 1)


@settings(deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_characters="\r\n"), min_size=1), min_size=1),
    st.lists(st.tuples(_PART, _PART)),
)
def test_each_line_is_told_once_however_its_bytes_come(
    lines: list[str], pieces: list[tuple[float, float]]
) -> None:
    whole = "\n".join(lines).encode(errors="replace")
    driver, sent = Driver(), 0
    for known, new in pieces:
        # A worker sends what is new; what is read behind it may begin anywhere before.
        start, end = int(known * sent), sent + int(new * (len(whole) - sent))
        driver.log.take(Output(0, 0, "x.err", start, whole[start:end]))
        sent = end
    driver.log.take(Output(0, 0, "x.err", 0, whole))
    driver.log.end(0, [0])
    assert driver.texts == [text for text in whole.decode().split("\n") if text.strip()]


def test_a_gap_is_told_with_the_file() -> None:
    driver = Driver()
    driver.log.take(Output(0, 0, "x.err", 0, b"one\ntw"))
    driver.log.take(Output(0, 0, "x.err", 5000, b"three\n"))
    assert driver.texts == ["one", "tw", "(4,994 bytes are left out: x.err)", "three"]


def test_lines_have_their_level_and_place_and_those_of_ray_are_none() -> None:
    text = b":job_id:01\n:actor_name:Worker\nlapflow WARNING: odd\n 10%\r 90%\rdone\r\n\nplain\n"
    driver = Driver()
    driver.log.take(Output(0, 0, "x.err", 0, text))
    assert [(line.level, line.text) for line in driver.lines] == [
        ("WARNING", "odd"),
        (None, "done"),
        (None, "plain"),
    ]
    assert str(driver.lines[-1]) == "worker 0 on 10.0.0.1: plain"
    driver = Driver(names_nodes=False)
    driver.log.take(Output(0, 0, "x.err", 0, b"plain\n"))
    assert str(driver.lines[-1]) == "worker 0: plain"


def test_what_a_worker_could_not_send_is_read_from_its_files(tmp_path: Path) -> None:
    out, err = tmp_path / "w.out", tmp_path / "w.err"
    out.write_text("one\n")
    err.write_text("first\nsec")
    driver = Driver(str(out), str(err))
    tail = OutputTail(driver.log.take, attempt=0, rank=0, paths=[str(out), str(err)])
    tail.flush()
    tail.flush()
    assert driver.texts == ["one", "first"]
    out.write_text("one\ntwo\n")
    err.write_text("first\nsecond\nlast")
    for reading in driver.log.read(0, [0]):
        reading.result()
    driver.log.look()
    driver.log.end(0, [0])
    assert sorted(driver.texts) == ["first", "last", "one", "second", "two"]
    tail.close()  # what was on its way comes late
    driver.log.end(0, [0])
    assert len(driver.lines) == 5
    assert driver.log.read(0) == []  # nothing is left to be read


def test_what_is_late_of_attempts_before_is_told_and_of_those_of_long_ago_forgotten() -> None:
    driver = Driver()
    seat = Seat(node="a", address="10.0.0.2", host="two", pid=2)
    driver.log.take(Output(0, 0, "x.err", 0, b"one\n"))
    driver.log.begin(Started(1, (seat,)))
    driver.log.begin(Started(2, (seat,)))
    driver.log.take(Output(0, 0, "x.err", 0, b"one\ntwo\n"))
    driver.log.begin(Started(3, (seat,)))
    driver.log.take(Output(0, 0, "x.err", 0, b"one\ntwo\nthree\n"))
    driver.log.take(Output(1, 0, "y.err", 0, b"four\n"))
    assert driver.texts == ["one", "two", "four"]
    assert [line.attempt for line in driver.lines] == [0, 0, 1]


def test_the_rest_of_an_attempt_is_read_when_the_next_one_trains_or_all_is_over(
    tmp_path: Path,
) -> None:
    files = [tmp_path / name for name in ("one.err", "two.err", "three.err")]
    for number, file in enumerate(files):
        file.write_text(f"first of {number}\nlast of {number}")
    driver = Driver(str(files[0]))
    driver.log.take(Output(0, 0, str(files[0]), 0, b"first of 0\n"))
    seats = [
        Seat(node="a", address="10.0.0.1", host="one", pid=1, output=(str(file),)) for file in files
    ]
    driver.log.begin(Started(1, (seats[1],)))
    assert driver.log.read(2) == []
    driver.log.advance(0)  # a late word of the attempt before
    driver.log.look()
    assert driver.texts == ["first of 0"]
    driver.log.advance(1)
    driver.log.begin(Started(2, (seats[2],)))
    driver.log.close(timeout_s=60)
    assert set(driver.texts) == {f"{which} of {n}" for which in ("first", "last") for n in range(3)}
    assert len(driver.lines) == 6


def test_of_much_that_was_written_the_end_is_read(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(ray_output, "_LAST_BYTES", 10)
    file = tmp_path / "w.err"
    file.write_text("x" * 1000 + "\nlast words\n"[-10:])
    (output,) = read_parts([Part(0, 0, str(file), 5), Part(0, 0, str(tmp_path / "none"), 0)])
    assert (output.start, output.data) == (1000, b"ast words\n")


def test_a_worker_sends_much_bit_by_bit(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(ray_output, "_CHUNK_BYTES", 10)
    monkeypatch.setattr(ray_output, "_AT_ONCE_BYTES", 25)
    file = tmp_path / "w.err"
    file.write_text("x" * 100)
    sent: list[Output] = []
    tail = OutputTail(sent.append, attempt=0, rank=0, paths=[str(file)])
    tail.flush(25)
    assert [len(output.data) for output in sent] == [10, 10, 5]
    tail.close()
    assert sum(len(output.data) for output in sent) == 100


def test_a_line_is_in_the_file_at_once_and_reaches_the_driver_where_there_is_none(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "w.err"
    file.touch()
    sent: list[Output] = []
    OutputTail(sent.append, attempt=0, rank=0, paths=[str(file)]).log("INFO", "one\nline")
    assert capfd.readouterr().err == "lapflow INFO: one line\n"
    driver = Driver()
    OutputTail(driver.log.take, attempt=0, rank=0, paths=[]).log("ERROR", "bad")
    assert [(line.level, line.text) for line in driver.lines] == [("ERROR", "bad")]


def test_only_files_are_followed(tmp_path: Path, monkeypatch) -> None:
    reading, writing = os.pipe()
    with (tmp_path / "w.err").open("w") as file, os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "__stdout__", pipe)
        monkeypatch.setattr(sys, "__stderr__", file)
        assert output_paths() == (str(tmp_path / "w.err"),)
    os.close(reading)
