"""Who trains a run: one launch at a time, and of that launch one attempt.

    <run>/lease/000000000007/holder.json     created once, by the launch that took the run
    <run>/lease/000000000007/beat.json       replaced by it every few seconds; its last says so
    <run>/lease/000000000007/attempt-00002   created by the workers of that attempt

The number is a fencing token. Who takes the run over creates the next one, and so of many one
succeeds, on every store that can create an object only where there is none. Before each commit the
workers look whether their token and attempt are still the newest, so whoever was thought dead and
comes back saves nothing.

No two clocks are compared. A launch is gone if it said so, if its process on this very machine is,
or if none of its beats comes while another launch looks for longer than several of them take.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import Field

from pipelines.console import visible
from pipelines.documents import DocumentError, seal, validate_as
from trainer.storage.errors import (
    LeaseLost,
    MissingObject,
    RunHeld,
    StoreError,
    SupersededAttempt,
)
from trainer.storage.kept import read_sealed
from trainer.storage.store import Store, check_key

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 10**5
MAX_TOKEN = 10**12 - 1
_MAX_BEAT_BYTES = 1 << 10
_PROCESSES = Path("/proc")
_Text = Annotated[str, Field(max_length=255)]
_Pid = Annotated[int, Field(ge=1, lt=1 << 31)]
_KEY = re.compile(r"([0-9]{12})/(holder\.json|attempt-([0-9]{5}))")


@dataclass(frozen=True, kw_only=True)
class LeaseTiming:
    """How often a holder shows that it lives, and how long others look for that.

    Attributes:
        beat_s: Seconds from one beat to the next.
        look_s: Seconds from one look to the next.
        looks: So many looks in a row that find no new beat make the holder count as gone.
    """

    beat_s: float = 10.0
    look_s: float = 1.0
    looks: int = 60


@dataclass(frozen=True, kw_only=True)
class Lease:
    """A launch's hold on a run, plain enough to travel to its workers.

    Attributes:
        run: Name of the run.
        token: The fencing token; the higher one holds the run.
        launch: Random name of the launch.
    """

    run: str
    token: int
    launch: str


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A launch as it tells of itself.

    Attributes:
        launch: Its random name.
        user: Who started it.
        host: Name of its machine.
        pid: Its process there.
        began_at: When it took the run, by that machine's clock; for people only.
        process: What tells that process from all others, as long as the machine runs.
    """

    launch: _Text
    user: _Text
    host: _Text
    pid: _Pid
    began_at: _Text
    process: _Text

    @classmethod
    def here(cls) -> Holder:
        """Describe this process as a new launch."""
        try:
            user = getpass.getuser()
        except (OSError, KeyError):  # a container's user may have no name
            user = str(os.getuid())
        return cls(
            launch=uuid.uuid4().hex[:12],
            user=user,
            host=socket.gethostname(),
            pid=os.getpid(),
            began_at=datetime.now(UTC).isoformat(timespec="seconds"),
            process=_identity(os.getpid()) or "",
        )

    def __str__(self) -> str:
        return visible(f"process {self.pid} of {self.user} on {self.host}, since {self.began_at}")

    @property
    def is_of_this_machine(self) -> bool:
        """Whether this machine can tell if the process lives."""
        return self.process != "" and self.process.split()[:2] == _namespace().split()

    @property
    def is_running(self) -> bool | None:
        """Whether the process, which must be of this machine, lives; None if that is not shown."""
        found = _identity(self.pid)
        if found is not None:
            return found == self.process
        # Of other users' processes a machine may show nothing (`hidepid`).
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return None


@dataclass(frozen=True, kw_only=True)
class _Held:
    """What the store tells of the newest launch.

    Attributes:
        token: Its fencing token.
        holder: The launch; None if its record is damaged.
        beat: The bytes of its last beat; none if they were not asked for.
        attempt: The newest attempt of its workers; -1 before the first.
    """

    token: int
    holder: Holder | None
    beat: bytes
    attempt: int

    @property
    def has_left(self) -> bool:
        """Whether it said that it has ended."""
        return b'"left": true' in self.beat

    def who(self) -> str:
        """Say who that is."""
        return "a launch whose record is damaged" if self.holder is None else str(self.holder)


class Fence:
    """Keeps workers that were thought dead from committing anything.

    Args:
        store: Where runs are kept.
        lease: Their launch's.
        attempt: Which start of the launch's workers they belong to, from 0.
    """

    def __init__(self, store: Store, lease: Lease, *, attempt: int) -> None:
        self._store = store
        self._lease = lease
        self._attempt = attempt

    @property
    def lease(self) -> Lease:
        """Their launch's hold on the run."""
        return self._lease

    @property
    def number(self) -> str:
        """Number of launch and attempt, in the order in which they have the run."""
        return f"{self._lease.token:012d}-{self._attempt:05d}"

    def enter(self) -> None:
        """Take the run over from earlier attempts of the same launch.

        Raises:
            LeaseLost: Another launch has taken the run.
            SupersededAttempt: A later attempt of this launch has begun.
            StoreError: The store fails.
        """
        self.check()
        key = _key(self._lease.run, self._lease.token, f"attempt-{self._attempt:05d}")
        self._store.create(key, b"begun\n")

    def check(self) -> Holder:
        """Look whether the run is still this attempt's.

        Returns:
            The launch that holds it.

        Raises:
            LeaseLost: Another launch has taken the run, or the store has no trace of this one.
            SupersededAttempt: A later attempt of this launch has begun.
            StoreError: The store fails.
        """
        lease = self._lease
        held = _look(self._store, lease.run, with_beat=False)
        if held is None:
            raise LeaseLost(
                f"{self._store.uri(lease.run)} holds no trace of this launch of "
                f"run={lease.run}: somebody has removed it, or this node sees another store than "
                "the one that started the run. Give all nodes the same store.uri, on S3 or in a "
                "shared folder."
            )
        if held.holder is None or held.holder.launch != lease.launch:
            raise LeaseLost(
                f"run={lease.run} was taken over by another launch ({held.who()}), so this one "
                "saves nothing more. Stop one of the two, or give it another run=NAME."
            )
        if held.attempt > self._attempt:
            raise SupersededAttempt(
                f"attempt {held.attempt} of run={lease.run} has begun, so attempt {self._attempt} "
                "saves nothing more."
            )
        return held.holder


@contextmanager
def hold_lease(
    store: Store,
    run: str,
    *,
    report: Callable[[str], None],
    on_lost: Callable[[LeaseLost], None],
    on_beat: Callable[[Lease], None] = lambda _lease: None,
    timing: LeaseTiming | None = None,
) -> Iterator[Lease]:
    """Hold a run for the length of a `with` block.

    Args:
        store: Where runs are kept.
        run: Name of the run.
        report: Takes a line when there is something to wait for or to tell.
        on_lost: Called in a thread when another launch has taken the run.
        on_beat: Called in a thread after each sign of life; may raise `StoreError`.
        timing: How often to beat and how long to look.

    Yields:
        What the workers need to check that the run is still theirs.

    Raises:
        RunHeld: Another launch holds the run, and lives.
        StoreError: The store fails.
    """
    timing = timing or LeaseTiming()
    lease = _acquire(store, run, report, timing)
    keeper = _Keeper(store, lease, on_lost, on_beat, timing)
    keeper.start()
    try:
        yield lease
    finally:
        keeper.end()


def _acquire(store: Store, run: str, report: Callable[[str], None], timing: LeaseTiming) -> Lease:
    me = Holder.here()
    while True:
        held = _look(store, run)
        living = None if held is None else _find_living(store, run, held, report, timing)
        if living is not None:
            raise RunHeld(
                f"run={run} is being trained by another launch: {living.who()}. Stop that one, or "
                f"choose another run=NAME. What tells so is {store.uri(run)}/lease."
            )
        if held is not None and held.token >= MAX_TOKEN:
            raise RunHeld(
                f"{store.uri(run)}/lease holds the last number that there is, {held.token}, which "
                "no launch has reached: somebody has put it there. Remove that folder."
            )
        lease = Lease(run=run, token=1 if held is None else held.token + 1, launch=me.launch)
        record = json.dumps(seal(asdict(me)), indent=1).encode()
        store.create(_key(run, lease.token, "holder.json"), record)
        # Some services look first and write then; and a request may be repeated whose answer was
        # lost. So what stands there decides.
        now = _look(store, run)
        if now is not None and now.holder == me:
            _beat(store, lease, 0)
            older = [key for key in store.list(_folder(run)) if _token(run, key) < now.token]
            store.delete_all(older)
            return lease


def _find_living(
    store: Store, run: str, held: _Held, report: Callable[[str], None], timing: LeaseTiming
) -> _Held | None:
    """Return the launch that holds the run, also one that took it meanwhile; None if none does."""
    for look in range(timing.looks):
        if held.has_left:
            return None
        holder = held.holder
        is_running = holder.is_running if holder and holder.is_of_this_machine else None
        if is_running:
            return held
        if is_running is False:
            report(f"run={run} was left without a word by {held.who()}: taking it over")
            return None
        if look == 0:
            report(
                f"run={run} may be held by {held.who()}: looking up to "
                f"{timing.looks * timing.look_s:g} s for a sign of life"
            )
        time.sleep(timing.look_s)
        now = _look(store, run)
        if now is None or (now.token, now.beat) != (held.token, held.beat):
            return None if now is None or now.has_left else now
    report(f"no sign of life of {held.who()}: taking over run={run}; what it saves is refused")
    return None


class _Keeper(threading.Thread):
    """Shows signs of life until the end, or until another launch has taken the run.

    Args:
        store: Where runs are kept.
        lease: What is held.
        on_lost: Called when it is lost.
        on_beat: Called after each sign of life.
        timing: How often to beat.
    """

    def __init__(
        self,
        store: Store,
        lease: Lease,
        on_lost: Callable[[LeaseLost], None],
        on_beat: Callable[[Lease], None],
        timing: LeaseTiming,
    ) -> None:
        super().__init__(name="lease", daemon=True)
        self._store = store
        self._lease = lease
        self._on_lost = on_lost
        self._on_beat = on_beat
        self._timing = timing
        self._ended = threading.Event()
        self._lost = False

    def run(self) -> None:
        """The thread's work."""
        # No attempt is later: among those of its own launch the workers see to it themselves.
        fence = Fence(self._store, self._lease, attempt=MAX_ATTEMPTS)
        number, told = 0, False
        while not self._ended.wait(self._timing.beat_s):
            number += 1
            try:
                _beat(self._store, self._lease, number)
                if self._ended.is_set():
                    return
                fence.check()
                self._on_beat(self._lease)
                told = False
            except LeaseLost as error:
                self._lost = True
                self._on_lost(error)
                return
            except StoreError as error:
                if not told:
                    logger.warning("the hold on run=%s is not renewed: %s", self._lease.run, error)
                told = True

    def end(self) -> None:
        """Let others have the run at once."""
        self._ended.set()
        self.join(self._timing.beat_s)
        if self._lost:
            return
        if self.is_alive():  # what it still writes would replace the word that the run is left
            self._warn("its last sign of life is still on the way to the store")
            return
        try:
            _beat(self._store, self._lease, -1, left=True)
        except StoreError as error:
            self._warn(error)

    def _warn(self, reason: object) -> None:
        logger.warning(
            "run=%s is not released, so the next launch may look for a minute: %s",
            self._lease.run,
            reason,
        )


def _beat(store: Store, lease: Lease, number: int, *, left: bool = False) -> None:
    beat = json.dumps({"launch": lease.launch, "number": number, "left": left})
    store.put(_key(lease.run, lease.token, "beat.json"), beat.encode())


def _look(store: Store, run: str, *, with_beat: bool = True) -> _Held | None:
    """Find the newest launch that took a run; None if none ever did."""
    while True:
        found = [_KEY.fullmatch(key.removeprefix(_folder(run))) for key in store.list(_folder(run))]
        matches = [match for match in found if match is not None]
        tokens = [int(match[1]) for match in matches if match[3] is None]
        if not tokens:
            return None
        token = max(tokens)
        attempts = [int(match[3]) for match in matches if match[3] and int(match[1]) == token]
        key = _key(run, token, "holder.json")
        try:
            holder: Holder | None = validate_as(Holder, read_sealed(store, key))
        except DocumentError:
            holder = None
        except MissingObject:
            continue  # a newer launch has taken the run and cleared this one away
        beat = b""
        if with_beat:
            with suppress(MissingObject):
                beat = store.get_range(_key(run, token, "beat.json"), 0, _MAX_BEAT_BYTES)
        return _Held(token=token, holder=holder, beat=beat, attempt=max(attempts, default=-1))


def _folder(run: str) -> str:
    return check_key(run) + "/lease/"


def _key(run: str, token: int, name: str) -> str:
    return f"{_folder(run)}{token:012d}/{name}"


def _token(run: str, key: str) -> int:
    """Return the token that a key belongs to; what is no launch's belongs to none that is old."""
    number = key.removeprefix(_folder(run)).partition("/")[0]
    return int(number) if re.fullmatch("[0-9]{12}", number) else MAX_TOKEN + 1


def _namespace() -> str:
    """Return what process numbers are unique in: this boot of the machine, and this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _identity(pid: int) -> str | None:
    """Return what tells a process from all others of its machine.

    Returns:
        "" if it has ended; None if the machine shows nothing of it.
    """
    try:
        # Behind the name, which may hold anything: the state first, the start in ticks as the 20th.
        fields = (_PROCESSES / f"{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    namespace = _namespace()
    return f"{namespace} {fields[19]}" if namespace and fields[0] not in "ZX" else ""
