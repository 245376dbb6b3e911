"""Which signals ask a run to stop, and which end it at once."""

import os
import signal
import threading
from collections.abc import Sequence

import pytest

from tests.support.clock import Clock
from trainer.cli import launch


@pytest.mark.parametrize(
    ("signals", "interrupted"),
    [
        # As Ray, `uv run` and a process group pass one request on.
        ([(signal.SIGTERM, 0), (signal.SIGTERM, 0), (signal.SIGTERM, 4)], False),
        ([(signal.SIGINT, 0), (signal.SIGTERM, 1)], False),
        ([(signal.SIGTERM, 0), (signal.SIGTERM, 6)], True),
        # A person's.
        ([(signal.SIGINT, 0), (signal.SIGINT, 0)], True),
        ([(signal.SIGTERM, 0), (signal.SIGINT, 0)], True),
    ],
)
def test_one_request_may_come_several_times(
    monkeypatch: pytest.MonkeyPatch, signals: Sequence[tuple[int, float]], interrupted: bool
) -> None:
    clock = Clock()
    monkeypatch.setattr(launch, "time", clock)
    stop = threading.Event()
    with launch._stop_on_signals(stop) as received:
        try:
            for number, after_s in signals:
                clock.now_s += after_s
                os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            assert interrupted
        else:
            assert not interrupted
    assert stop.is_set()
    assert received == [signals[0][0]]
