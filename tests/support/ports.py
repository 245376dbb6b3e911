"""Ports for servers that tests start: nothing else takes them between the choice and the start."""

from __future__ import annotations

import random
from contextlib import suppress
from socket import create_server

# The system hands out ports from 32,768 on for connections, and Ray those up to 19,999.
_PORTS = range(20_000, 32_000)
_chance = random.SystemRandom()
_given: set[int] = set()


def free_port(host: str = "127.0.0.1") -> int:
    """A port of this machine that nobody listens on, another one at each call."""
    while True:
        port = _chance.choice(_PORTS)
        if port in _given:
            continue
        with suppress(OSError), create_server((host, port)):
            _given.add(port)
            return port
