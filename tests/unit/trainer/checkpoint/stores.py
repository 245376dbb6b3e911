"""Stores for tests: one in memory, and one around another that watches or breaks operations."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

from trainer.storage.errors import MissingObject
from trainer.storage.store import Store, check_key, check_prefix

Result = TypeVar("Result")


class MemoryStore:
    """A store in a dict."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def put(self, key: str, data: bytes | memoryview) -> None:
        self.objects[check_key(key)] = bytes(data)

    def put_pieces(self, key: str, pieces: Iterator[bytes]) -> None:
        self.put(key, b"".join(pieces))

    def create(self, key: str, data: bytes) -> bool:
        with self._lock:
            if check_key(key) in self.objects:
                return False
            self.objects[key] = data
            return True

    def get(self, key: str) -> bytes:
        try:
            return self.objects[check_key(key)]
        except KeyError:
            raise MissingObject(f"There is no object at {self.uri(key)}.") from None

    def get_range(self, key: str, start: int, size: int) -> bytes:
        return self.get(key)[start : start + size]

    def fingerprint(self, key: str) -> str:
        return hashlib.sha256(self.get(key)).hexdigest()

    def move(self, key: str, to: str) -> None:
        data = self.get(key)
        self.objects[check_key(to)] = data
        del self.objects[key]

    def delete(self, key: str) -> None:
        self.objects.pop(check_key(key), None)

    def delete_all(self, keys: Collection[str]) -> None:
        for key in keys:
            self.delete(key)

    def uri(self, key: str) -> str:
        return f"memory://{check_key(key)}"

    def list(self, prefix: str) -> dict[str, int]:
        check_prefix(prefix)
        with self._lock:
            return {
                key: len(data)
                for key, data in sorted(self.objects.items())
                if key.startswith(prefix)
            }

    def abort_unfinished(self, prefix: str, is_dead: Callable[[str], bool]) -> int:
        return 0  # a put is done at once


class WatchedStore:
    """Calls `watch(number, verb, key, "before" | "after")` around each operation of another store.

    What `watch` raises is what the caller sees: before the operation it did not happen, after it
    its answer was lost.
    """

    def __init__(self, store: Store, watch: Callable[[int, str, str, str], None]) -> None:
        self._store = store
        self._watch = watch
        self._count = 0
        self._lock = threading.Lock()

    def put(self, key: str, data: bytes | memoryview) -> None:
        self._around("put", key, lambda: self._store.put(key, data))

    def put_pieces(self, key: str, pieces: Iterator[bytes]) -> None:
        self._around("put_pieces", key, lambda: self._store.put_pieces(key, pieces))

    def create(self, key: str, data: bytes) -> bool:
        return self._around("create", key, lambda: self._store.create(key, data))

    def get(self, key: str) -> bytes:
        return self._around("get", key, lambda: self._store.get(key))

    def get_range(self, key: str, start: int, size: int) -> bytes:
        return self._around("get_range", key, lambda: self._store.get_range(key, start, size))

    def fingerprint(self, key: str) -> str:
        return self._around("fingerprint", key, lambda: self._store.fingerprint(key))

    def move(self, key: str, to: str) -> None:
        self._around("move", key, lambda: self._store.move(key, to))

    def delete(self, key: str) -> None:
        self._around("delete", key, lambda: self._store.delete(key))

    def delete_all(self, keys: Collection[str]) -> None:
        # Many deletes are no single one: a process may die in between.
        for key in keys:
            self.delete(key)

    def uri(self, key: str) -> str:
        return self._store.uri(key)

    def list(self, prefix: str) -> dict[str, int]:
        return self._around("list", prefix, lambda: self._store.list(prefix))

    def abort_unfinished(self, prefix: str, is_dead: Callable[[str], bool]) -> int:
        return self._around(
            "abort_unfinished", prefix, lambda: self._store.abort_unfinished(prefix, is_dead)
        )

    def _around(self, verb: str, key: str, operation: Callable[[], Result]) -> Result:
        with self._lock:
            number = self._count
            self._count += 1
        self._watch(number, verb, key, "before")
        result = operation()
        self._watch(number, verb, key, "after")
        return result


class Killed(BaseException):
    """The process is gone: nothing of it catches this."""


def killed_at(store: Store, number: int, moment: str) -> WatchedStore:
    """A store whose users die at that operation, and cannot do anything from then on."""
    dead = threading.Event()

    def watch(current: int, verb: str, key: str, when: str) -> None:
        if dead.is_set() and when == "before":
            raise Killed
        if current == number and when == moment:
            dead.set()
            raise Killed

    return WatchedStore(store, watch)


def count_operations(store: Store, act: Callable[[Store], object]) -> list[str]:
    """The verbs `act` uses on the store, in order."""
    verbs: list[str] = []

    def watch(number: int, verb: str, key: str, when: str) -> None:
        if when == "before":
            verbs.append(verb)

    act(WatchedStore(store, watch))
    return verbs
