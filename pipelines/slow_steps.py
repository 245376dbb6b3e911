"""A word in the log about steps that take unusually long, while they do."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

_SLOW_S = 30.0


@contextmanager
def told_when_slow(step: str) -> Iterator[None]:
    """Log a warning if the block takes longer than 30 s.

    Args:
        step: What the block does, to go on after "still": "fetching s3://bucket/key".
    """
    timer = threading.Timer(_SLOW_S, logger.warning, ("still %s after %.0f s", step, _SLOW_S))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
