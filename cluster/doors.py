"""Who may tell a Ray cluster to run something: its job server, asked without a token.

What a job server is sent it executes. Ray has it listen on loopback alone unless told otherwise,
but all else of a cluster listens on every address of its machines; a token keeps all these doors.
"""

import ipaddress
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

_ANSWER_TIMEOUT_S = 5.0
_REFUSALS = (401, 403)
TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
ADVICE = (
    "Have it ask for one: `ray get-auth-token --generate`, the same ~/.ray/auth_token on all "
    "nodes, and RAY_AUTH_MODE=token in the environment of `ray start`"
)
"""What to do about an open door."""


def is_loopback(host: str) -> bool:
    """Whether an address, or all that a name stands for, can be reached from this machine alone."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return bool(found) and all(ipaddress.ip_address(each).is_loopback for each in found)


def asks_for_token(address: str) -> bool | None:
    """Whether a job server refuses those who have no token.

    Args:
        address: `http://host:port`, or https.

    Returns:
        None if nothing that can be told comes back.
    """
    # Directly, and where that leads nowhere by the proxy that Ray's own requests would take.
    for way in (urllib.request.ProxyHandler({}), urllib.request.ProxyHandler()):
        try:
            # No redirects to other schemes, no credentials: what a stranger would send.
            with urllib.request.build_opener(way).open(
                f"{address.rstrip('/')}/api/jobs/", timeout=_ANSWER_TIMEOUT_S
            ):
                return False
        except urllib.error.HTTPError as error:
            if error.code in _REFUSALS:
                return True
        except (OSError, ValueError):
            continue
    return None


def open_door(address: str) -> str | None:
    """Why others than this machine's users may have a job server run what they like, as a clause.

    Returns:
        None if they may not. Where nothing tells whether it asks for a token, they may.
    """
    if is_loopback(urlsplit(address).hostname or ""):
        return None
    asks = asks_for_token(address)
    if asks:
        return None
    return "asks for no token" if asks is False else "does not tell whether it asks for a token"


def open_door_warning(
    hosts: Sequence[str], job_server: str | None, *, has_token: bool
) -> str | None:
    """A word on a cluster that whoever reaches its machines can have run anything.

    Args:
        hosts: Addresses of its nodes.
        job_server: `host:port`; None if it has none.
        has_token: Whether this process was let in by a token; it counts if the server does not
            answer.
    """
    if all(is_loopback(host) for host in hosts):
        return None
    asks = asks_for_token(f"http://{job_server}") if job_server else None
    if has_token if asks is None else asks:
        return None
    return (
        "warning: this Ray cluster asks for no token, so whoever reaches its machines can have "
        f"them run anything as you. {ADVICE}, or let nobody else into its network."
    )


def use_token() -> None:
    """Have Ray send its token wherever there is one, which it does only if it is told to.

    To be called before Ray is imported, which reads the environment then.
    """
    if "RAY_AUTH_MODE" in os.environ:
        return
    given = any(os.environ.get(name) for name in TOKEN_VARIABLES)
    if given or (Path.home() / ".ray" / "auth_token").exists():
        os.environ["RAY_AUTH_MODE"] = "token"
