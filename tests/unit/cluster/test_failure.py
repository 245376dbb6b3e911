import pytest

from cluster.contract import WorkerContext
from cluster.failure import (
    Failure,
    WorkerFailed,
    WorkerRefused,
    describe_exit,
    exit_failure,
    is_of_lost_peer,
    root_cause,
    run_worker,
)

CONTEXT = WorkerContext(
    rank=3,
    world_size=4,
    local_rank=1,
    local_world_size=2,
    attempt=2,
    device="cpu",
    stop_requested=lambda: False,
    report=lambda message: None,
)


def raising(error):
    def worker(context, payload):
        raise error

    return worker


def failure(rank, kind, text):
    return Failure(rank=rank, attempt=0, kind=kind, text=text)


def test_a_worker_that_returns_is_no_failure():
    assert run_worker(lambda context, payload: None, CONTEXT, {}) is None


def test_a_value_error_is_a_refusal_in_its_own_words():
    class Mistake(ValueError):
        pass

    told = run_worker(raising(Mistake("use blue")), CONTEXT, {})
    assert told is not None
    assert (told.rank, told.attempt, told.kind) == (3, 2, "refused")
    error = told.error()
    assert isinstance(error, WorkerRefused)
    assert isinstance(error, ValueError)
    assert str(error) == "use blue"
    assert error.traceback_tail.endswith("Mistake: use blue")


@pytest.mark.parametrize(
    "error", [RuntimeError("boom"), SystemExit("boom"), KeyboardInterrupt("boom")]
)
def test_whatever_else_is_raised_is_told_with_its_traceback(error):
    told = run_worker(raising(error), CONTEXT, {})
    assert told is not None
    assert told.kind == "raised"
    assert str(told.error()).startswith(f"Worker 3 failed with {type(error).__name__}: boom\n")
    assert "in worker" in str(told.error())


def test_a_signal_without_a_name_has_a_number():
    assert "Worker 1 was ended by signal 35." in str(exit_failure(1, 0, -35).error())


def test_a_signal_is_named():
    assert "SIGKILL" in str(exit_failure(1, 0, -9).error())
    assert "memory" in str(exit_failure(1, 0, -9).error())
    assert str(exit_failure(1, 0, 3).error()) == "Worker 1 ended with exit code 3."
    assert isinstance(exit_failure(1, 0, 3).error(), WorkerFailed)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (75, "stood still, or was out of its driver's reach, and ended itself with exit code 75"),
        (143, "was ended by SIGTERM (exit code 143): by hand, or because its node is shut down"),
        (-15, "was ended by SIGTERM: by hand, or because its node is shut down"),
        (137, "was ended by SIGKILL (exit code 137): by hand, or by the kernel because memory ra"),
        (139, "was ended by SIGSEGV (exit code 139)"),
        (1, "ended with exit code 1"),
        (128, "ended with exit code 128"),
        (255, "ended with exit code 255"),
    ],
)
def test_what_an_exit_code_says(code, words):
    assert describe_exit(code).startswith(words)


@pytest.mark.parametrize(
    "text",
    [
        "RuntimeError: Wait timeout",
        "DistStoreError: wait timeout after 1500ms, keys: /default_pg/0//cuda//0",
        "DistNetworkError: failed to recv, got 0 bytes",
    ],
)
def test_what_torchs_stores_say_of_a_peer_that_is_gone_blames_nobody(text):
    assert is_of_lost_peer(failure(0, "raised", text))
    boom = failure(1, "raised", "RuntimeError: boom")
    assert root_cause([failure(0, "raised", text), boom]) == boom


def test_a_database_that_waits_for_a_lock_is_no_peer_that_is_gone():
    text = "OperationalError: (1205, 'Lock wait timeout exceeded; try restarting transaction')"
    assert not is_of_lost_peer(failure(0, "raised", text))


GLOO = failure(0, "raised", "RuntimeError: [gloo/pair.cc] Connection closed by peer")
BUG = failure(1, "raised", "KeyError: 'colour'")
DEATH = failure(2, "died", "was ended by SIGKILL")
MISTAKE = failure(3, "refused", "use blue")


@pytest.mark.parametrize(
    ("failures", "cause"),
    [
        ([GLOO, BUG], BUG),
        ([GLOO, DEATH, BUG], DEATH),
        ([GLOO, DEATH, MISTAKE], MISTAKE),
        ([GLOO], GLOO),
    ],
)
def test_the_cause_is_told_apart_from_its_consequences(failures, cause):
    assert root_cause(failures) is cause


def test_of_equals_the_first_counts():
    later = failure(0, "raised", "TypeError: late")
    assert root_cause([BUG, later]) is BUG
    assert root_cause([later, BUG]) is later
