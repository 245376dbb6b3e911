"""`python -m cluster.spot_notice`: has Ray know that EC2 takes this spot instance away.

EC2 says so two minutes ahead, to whoever asks the instance's metadata service, and Ray does not
ask. This does, every few seconds. Once there is a notice it drains the machine's Ray node with the
notice's deadline; then runs save and leave (`cluster.ray_leaving`). It needs no right in AWS.
"""

import argparse
import logging
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

_SERVICE = "http://169.254.169.254"
_TOKEN, _NOTICE = "latest/api/token", "latest/meta-data/spot/instance-action"
_LIFETIME, _PROOF = "X-aws-ec2-metadata-token-ttl-seconds", "X-aws-ec2-metadata-token"
_LIFETIME_S = 21600
"""The longest that a token may last. One that is over is answered by 401."""
_NOT_FOUND, _UNAUTHORIZED = 404, 401
_MOST_BYTES = 65536
_FIELD = r'"{}"\s*:\s*"([^"\\]+)"'
_EVERY_S = 5.0
"""As often as AWS advises."""
_ANSWER_S = 2.0
_DRAIN_S = 30.0
"""What Ray's command gets, which starts a Python of its own."""
_RAY_STARTS_S = 10.0
"""What it may take until it counts: rather is a node left too early than too late."""

_log = logging.getLogger("spot_notice")


@dataclass(frozen=True)
class Notice:
    """That EC2 takes the instance away.

    Attributes:
        action: `terminate`, `stop` or `hibernate`.
        at: When, in seconds since 1970; None if the notice does not tell.
    """

    action: str
    at: float | None


class MetadataService:
    """What an instance knows of itself, by version 2 of EC2's service.

    Args:
        address: Of the service, as `http://169.254.169.254`.
    """

    def __init__(self, address: str) -> None:
        self._address = address.rstrip("/")
        # It is the instance's own: no proxy leads there.
        self._opener = build_opener(ProxyHandler({}))
        self._token: str | None = None

    def notice(self) -> Notice | None:
        """Asks for a notice; None if there is none.

        Raises:
            OSError: The service does not answer, or not as EC2's does.
        """
        try:
            told = self._get()
        except (HTTPException, ValueError) as error:  # the latter of a token that is none
            raise OSError(f"{type(error).__name__}: {error}") from error
        return None if told is None else read_notice(told)

    def _get(self) -> bytes | None:
        is_new = self._token is None
        if self._token is None:
            lifetime = {_LIFETIME: str(_LIFETIME_S)}
            self._token = self._ask("PUT", _TOKEN, lifetime).decode("latin-1").strip()
        try:
            return self._ask("GET", _NOTICE, {_PROOF: self._token})
        except HTTPError as error:
            if error.code == _NOT_FOUND:
                return None
            self._token = None
            if error.code == _UNAUTHORIZED and not is_new:
                return self._get()
            raise

    def _ask(self, method: str, path: str, headers: dict[str, str]) -> bytes:
        request = Request(f"{self._address}/{path}", method=method, headers=headers)
        with self._opener.open(request, timeout=_ANSWER_S) as answer:
            content: bytes = answer.read(_MOST_BYTES)
        return content


def read_notice(told: bytes) -> Notice:
    """Reads a notice. One that cannot be read is a notice all the same, of unknown time."""
    text = told.decode("utf-8", "replace")
    action, time_ = (re.search(_FIELD.format(name), text) for name in ("action", "time"))
    try:
        at = datetime.fromisoformat("" if time_ is None else time_[1])
    except ValueError:
        return Notice("take", None)
    return Notice(
        "take" if action is None else action[1],
        (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp(),
    )


def drain_command(ray: Path, notice: Notice, *, now: float) -> list[str]:
    """Ray's command that announces the end of this machine's node.

    Args:
        ray: The program.
        notice: What EC2 said.
        now: Seconds since 1970. Ray counts from when its program has started.
    """
    words = [
        *(str(ray), "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"),
        *("--reason-message", f"EC2 is about to {notice.action} this spot instance"),
    ]
    if notice.at is None:
        return words
    return [
        *words,
        "--deadline-remaining-seconds",
        str(max(1, int(notice.at - now - _RAY_STARTS_S))),
    ]


def drain(notice: Notice) -> bool:
    """Drains this machine's node; whether Ray took it."""
    ray = Path(sys.executable).with_name("ray")
    command = drain_command(ray, notice, now=time.time())
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_DRAIN_S, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        _log.error("%s failed: %s", " ".join(command), error)
        return False
    if done.returncode != 0:
        _log.error("%s failed:\n%s%s", " ".join(command), done.stdout, done.stderr)
        return False
    _log.info("drained: %s", " ".join(command))
    return True


def wait_for_notice(
    service: MetadataService,
    take: Callable[[Notice], bool],
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> Notice:
    """Asks until there is a notice that was taken, and gives it.

    Args:
        service: Is asked. While it does not answer, this is told once, and it is asked again.
        take: Does what is to be done; whether it has. If not, it is called again.
        sleep: Waits so many seconds.
    """
    was_silent = False
    while True:
        try:
            notice = service.notice()
        except OSError as error:
            if not was_silent:
                _log.warning("the metadata service does not answer: %s; asking again", error)
            was_silent = True
        else:
            if was_silent:
                _log.info("the metadata service answers again")
            was_silent = False
            if notice is not None and take(notice):
                return notice
        sleep(_EVERY_S)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.spot_notice",
        description="Wait until EC2 announces that it takes this spot instance away, then drain "
        "the Ray node that runs here, and end. Its log goes to standard error.",
    )
    parser.add_argument(
        "--service", default=_SERVICE, help="address of the metadata service (%(default)s)"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )
    _log.info("asking %s every %g s for a spot notice", options.service, _EVERY_S)
    wait_for_notice(MetadataService(options.service), drain)
    return 0


if __name__ == "__main__":
    sys.exit(main())
