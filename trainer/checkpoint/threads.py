"""Reading from a store with several requests at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVarTuple

Arguments = TypeVarTuple("Arguments")

READERS = 8


def in_threads(step: Callable[[*Arguments], None], arguments: Iterable[tuple[*Arguments]]) -> None:
    """Run a step for all arguments, several at a time, and raise the first error.

    After an error nothing more is begun, and what was begun is waited for.
    """
    with ThreadPoolExecutor(READERS, thread_name_prefix="checkpoint") as pool:
        futures = [pool.submit(step, *each) for each in arguments]
        try:
            for future in futures:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)
