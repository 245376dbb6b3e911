"""A store that fails is tried again for as long as there is time, and no longer."""

import threading
import time
from collections.abc import Callable

import pytest

from trainer.storage import retry
from trainer.storage.errors import MissingObject, StoreError, StoreUnreachable, VanishedObject
from trainer.storage.retry import RetryPolicy


class Step:
    """A step that fails some times; each failure is told apart by its number."""

    def __init__(self, failures: int, error: type[Exception] = StoreUnreachable) -> None:
        self.failures = failures
        self.error = error
        self.tries = 0
        self.at_failure: Callable[[], None] = lambda: None

    def __call__(self) -> int:
        self.tries += 1
        if self.tries > self.failures:
            return self.tries
        self.at_failure()
        raise self.error(f"failure {self.tries}.") from OSError("cause")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 1e-3)


def test_a_step_is_tried_until_it_succeeds(caplog: pytest.LogCaptureFixture) -> None:
    assert RetryPolicy(600).call(Step(4)) == 5
    assert caplog.messages == [f"failure {n}. Trying again in 0 s." for n in range(1, 5)]


@pytest.mark.parametrize("error", [VanishedObject, MissingObject, KeyError])
def test_what_no_time_cures_is_raised_at_once(error: type[Exception]) -> None:
    step = Step(9, error)
    with pytest.raises(error, match="failure 1"):
        RetryPolicy(600).call(step)
    assert step.tries == 1


def test_without_patience_there_is_one_try() -> None:
    step = Step(1)
    with pytest.raises(StoreUnreachable, match="failure 1"):
        RetryPolicy(0).call(step)


def test_the_last_failure_is_raised_with_its_cause() -> None:
    step = Step(10**9)
    with pytest.raises(StoreError) as caught:
        RetryPolicy(0.02).call(step)
    assert str(caught.value) == f"failure {step.tries}."
    assert step.tries > 1
    assert isinstance(caught.value.__cause__, OSError)


def test_time_counts_from_the_first_failure_and_not_from_a_long_first_try() -> None:
    step = Step(1)
    step.at_failure = lambda: time.sleep(0.2)
    assert RetryPolicy(0.1).call(step) == 2


def test_a_deadline_ends_the_pause_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 3600.0)  # no test waits for that
    policy, step = RetryPolicy(10**6), Step(10**9)
    assert policy.left_s() is None
    step.at_failure = lambda: threading.Timer(0.05, policy.set_deadline, (0.05,)).start()
    with pytest.raises(StoreUnreachable):
        policy.call(step)
    assert step.tries == 2
    assert policy.left_s() == 0.0


def test_pauses_stay_short_once_there_is_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "MAX_PAUSE_S", 3600.0)
    policy, step = RetryPolicy(10**6), Step(40)  # the fortieth pause of a calm run is an hour
    policy.set_deadline(600)
    assert policy.call(step) == 41


def test_the_first_deadline_stands() -> None:
    policy = RetryPolicy(600)
    policy.set_deadline(0)
    policy.set_deadline(600)
    with pytest.raises(StoreUnreachable, match="failure 1"):
        policy.call(Step(1))
