"""The goodput of a run while it lasts, as points for the tracker.

The driver, which knows what the time went into, has no way to the tracker as long as the workers
have one. So the first rank reads what the driver has written down.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from trainer.metrics.tracker import Tracker
from trainer.storage.errors import StoreError
from trainer.storage.lease import Lease
from trainer.storage.store import Store
from trainer.training.goodput import (
    LaunchTime,
    read_launch,
    read_launches,
    time_metrics,
    total_time,
)

logger = logging.getLogger(__name__)

_LEAST_S = 10.0
"""As often as the driver writes."""
_SHARE = 0.01
"""A point comes when the attempt has lasted so much longer: of a month there are some hundreds."""
_LEAVE_S = 5.0


@contextmanager
def draw_goodput(
    tracker: Tracker, store: Store, lease: Lease, *, least_s: float = _LEAST_S
) -> Iterator[None]:
    """Give the tracker points for the length of a `with` block, in a thread of its own.

    Args:
        tracker: Takes them, each at the images that the driver knows of.
        store: Where the driver writes.
        lease: The launch's.
        least_s: Least seconds between two points.
    """
    over = threading.Event()

    def draw() -> None:
        earlier: Sequence[LaunchTime] | None = None
        began, told, images = time.monotonic(), False, 0
        while not over.wait(max(least_s, _SHARE * (time.monotonic() - began))):
            try:
                if earlier is None:
                    earlier = read_launches(store, lease.run, before=lease.token)
                launch = read_launch(store, lease)
            except StoreError as error:
                if not told:
                    logger.warning("the goodput is not shown for now: %s", error)
                told = True
                continue
            seen = 0 if launch is None else _images(launch)
            if launch is not None and seen > images and not over.is_set():
                images = seen
                tracker.metrics(time_metrics(total_time([*earlier, launch])), images=images)

    thread = threading.Thread(target=draw, name="goodput", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(_LEAVE_S)


def _images(launch: LaunchTime) -> int:
    marks = launch.attempts[-1].marks if launch.attempts else ()
    return marks[-1].images if marks else 0
