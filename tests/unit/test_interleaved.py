"""The benchmarks' harness: turns, minima and ratios on a clock that the test moves."""

import json
import time

import pytest
import torch

from benchmarks.command import Report
from benchmarks.interleaved import TimingError, interleave, stopwatch_of
from benchmarks.prefix_attention import kept_bytes


class FakeClock:
    """A stopwatch that reports prepared durations and remembers who was timed."""

    def __init__(self, durations):
        self.durations = {name: iter(list(values)) for name, values in durations.items()}
        self.order = []

    def __call__(self, work):
        name = work()
        self.order.append(name)
        return next(self.durations[name])


def candidates(*names):
    return {name: lambda name=name: name for name in names}


def test_minima_and_ratios_to_the_first_candidate():
    clock = FakeClock({"base": [9.0, 2.0, 4.0, 3.0], "new": [9.0, 1.5, 1.0, 8.0]})
    base, new = interleave(candidates("base", "new"), rounds=3, stopwatch=clock)
    assert (base.name, base.seconds, base.minimum, base.ratio) == ("base", (2.0, 4.0, 3.0), 2.0, 1)
    assert (new.minimum, new.ratio) == (1.0, 0.5)
    assert base.spread == pytest.approx(0.5)
    assert new.spread == pytest.approx(0.5)


def test_candidates_take_turns_and_every_other_round_goes_backwards():
    clock = FakeClock({name: [1.0] * 9 for name in "abc"})
    interleave(candidates("a", "b", "c"), rounds=3, stopwatch=clock, warmup=1)
    assert "".join(clock.order) == "cba" + "abc" + "cba" + "abc"


def test_rounds_that_warm_up_do_not_count():
    clock = FakeClock({"a": [0.1, 0.2, 3.0, 4.0]})
    (timing,) = interleave(candidates("a"), rounds=2, stopwatch=clock, warmup=2)
    assert timing.seconds == (3.0, 4.0)


@pytest.mark.parametrize(("names", "rounds", "warmup"), [("", 1, 0), ("a", 0, 0), ("a", 1, -1)])
def test_comparisons_that_cannot_be_made_are_refused(names, rounds, warmup):
    with pytest.raises(TimingError, match=f"rounds={rounds}"):
        interleave(candidates(*names), rounds=rounds, warmup=warmup, stopwatch=FakeClock({}))


def test_the_wall_clock_measures_the_work(monkeypatch):
    now = iter([10.0, 12.5])
    monkeypatch.setattr("benchmarks.interleaved.time.perf_counter", lambda: next(now))
    done = []
    assert stopwatch_of(torch.device("cpu"))(lambda: done.append(1)) == 2.5
    assert done == [1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_cuda_clock_waits_for_the_device():
    a = torch.randn(8192, 8192, device="cuda")
    watch = stopwatch_of(torch.device("cuda"))
    watch(lambda: a @ a)
    assert watch(lambda: [a @ a for _ in range(8)]) > 3 * watch(lambda: a @ a)


def test_a_report_holds_its_conditions_and_rounds_only_for_the_terminal(tmp_path):
    report = Report("thing", device=torch.device("cpu"), settings={"batch": 3})
    report.add(name="a", seconds=1.23456789, peak=None)
    report.add(name="longer", seconds=2.0, extra=7)
    told = report.deliver(tmp_path / "out.json")
    assert told.splitlines()[3:] == [
        "name    seconds  peak  extra",
        "a       1.235    -     -",
        "longer  2        -     7",
    ]
    kept = json.loads((tmp_path / "out.json").read_text())
    assert kept["rows"][0] == {"name": "a", "seconds": 1.23456789, "peak": None}
    assert kept["settings"] == {"batch": 3}
    assert set(kept["conditions"]) >= {"device", "torch", "threads", "load_before", "load_after"}


def test_kept_bytes_are_those_of_what_backward_needs():
    a = torch.randn(4, 8, requires_grad=True)
    b = torch.randn(8, 2, requires_grad=True)
    assert kept_bytes(lambda: a @ b) == 4 * (a.numel() + b.numel())
    assert kept_bytes(lambda: a + 1) == 0
    assert kept_bytes(lambda: a * a) == 4 * a.numel()  # one storage, saved twice


def test_processor_time_leaves_waiting_out() -> None:
    watch = stopwatch_of(torch.device("cpu"), processor=True)
    assert watch(lambda: time.sleep(0.5)) < 0.4
    end = time.process_time() + 0.1

    def compute() -> None:
        while time.process_time() < end:
            pass

    assert watch(compute) > 0.05
