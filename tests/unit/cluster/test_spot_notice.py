"""What is done about a notice of EC2's metadata service, which a real local server plays."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path

import pytest

from cluster.spot_notice import (
    MetadataService,
    Notice,
    drain_command,
    read_notice,
    wait_for_notice,
)
from tests.support.metadata_service import metadata_service
from tests.support.ports import free_port

AT = 1_796_083_200.0  # 2026-12-01T00:00:00Z
NOTICE = "/latest/meta-data/spot/instance-action"


def test_it_asks_with_a_token_until_there_is_a_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")  # which nobody is
    waits: list[float] = []
    with metadata_service() as instance:

        def sleep(seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == 2:
                instance.announce("terminate", AT)

        taken: list[Notice] = []
        told = wait_for_notice(
            MetadataService(instance.address), lambda one: taken.append(one) is None, sleep=sleep
        )
    assert told == Notice("terminate", AT)
    assert taken == [told]
    assert waits == [5.0, 5.0]
    assert instance.asked == [
        ("PUT", "/latest/api/token", 200),  # one for all questions
        ("GET", NOTICE, 404),
        ("GET", NOTICE, 404),
        ("GET", NOTICE, 200),
    ]


def test_a_token_that_is_over_is_replaced_at_once() -> None:
    with metadata_service() as instance:
        service = MetadataService(instance.address)
        assert service.notice() is None
        instance.tokens.clear()
        instance.announce("stop", AT)
        assert service.notice() == Notice("stop", AT)
    assert [code for _, _, code in instance.asked] == [200, 404, 401, 200, 200]


def test_a_service_that_is_away_is_told_once_and_asked_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    port, tries = free_port(), 0
    with ExitStack() as at_last, caplog.at_level(logging.INFO):

        def sleep(_seconds: float) -> None:
            nonlocal tries
            tries += 1
            if tries == 3:
                at_last.enter_context(metadata_service(port)).announce("terminate", AT)

        service = MetadataService(f"http://127.0.0.1:{port}/")
        assert wait_for_notice(service, lambda _: True, sleep=sleep).at == AT
    assert tries == 3
    away, back = caplog.messages
    assert "the metadata service does not answer" in away
    assert "answers again" in back


def test_a_machine_that_is_no_instance_is_asked_again_too() -> None:
    """Where something else answers, as a proxy does, that is no notice."""
    with metadata_service() as instance:
        service = MetadataService(f"{instance.address}/elsewhere")
        with pytest.raises(OSError, match="403"):
            service.notice()


def test_what_ray_did_not_take_is_told_it_again() -> None:
    answers = iter([False, False, True])
    with metadata_service() as instance:
        instance.announce("terminate", AT)
        wait_for_notice(
            MetadataService(instance.address), lambda _: next(answers), sleep=lambda _: None
        )
    assert list(answers) == []


@pytest.mark.parametrize(
    ("told", "notice"),
    [
        (b'{"action": "stop", "time": "2026-12-01T00:00:00Z"}', Notice("stop", AT)),
        (b'{"action": "hibernate", "time": "2026-12-01T00:00:00"}', Notice("hibernate", AT)),
        (b'{"action": "terminate"}', Notice("take", None)),
        (b'{"action": "terminate", "time": "soon"}', Notice("take", None)),
        (b"[]", Notice("take", None)),
        (b"", Notice("take", None)),
        (b"\xff", Notice("take", None)),
    ],
)
def test_a_notice_that_cannot_be_read_is_one_all_the_same(told: bytes, notice: Notice) -> None:
    assert read_notice(told) == notice


def test_ray_is_told_how_long_its_node_has() -> None:
    ray = Path("/venv/bin/ray")
    command = drain_command(ray, Notice("terminate", AT), now=AT - 118.5)
    assert command == [
        *("/venv/bin/ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"),
        *("--reason-message", "EC2 is about to terminate this spot instance"),
        *("--deadline-remaining-seconds", "108"),
    ]
    # By a clock that is ahead: Ray takes no time that is over.
    assert drain_command(ray, Notice("stop", AT), now=AT + 9)[-1] == "1"
    assert "--deadline-remaining-seconds" not in drain_command(ray, Notice("take", None), now=AT)
