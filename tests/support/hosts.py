"""Hosts of a cluster, all on this machine: Linux namespaces whose cables meet in one switch.

A host has a network, a process table, mounts, IPC and a name of its own: its own address, process
numbers, `/tmp`, `/dev/shm` and home. Its first process is its power supply. The switch is in a
namespace too, so hosts reach each other and nothing else, and nothing outside reaches them.

All of it ends with the process that made it, even one that is killed, since each first process
reads from a pipe of which that process alone holds the other end. It takes root.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from shlex import quote

import psutil

_NETWORK = "10.231.0"
_NOWHERE = f"{_NETWORK}.254"
"""The router that hosts send to whatever they do not know; there is none."""
_LONGEST_NAME = 12
"""An interface's name has at most 15 characters, and the cable's has three before the host's."""

_MEMORY = Path("/sys/fs/cgroup/memory")
_MEMORY_BYTES = 64 * 2**20
_DEATH_S = 60
_HOG = """
import sys
sys.stdin.readline()
held = []
while True:
    held.append(bytearray(b"x") * 2**20)
"""

_CODE = (Path(__file__).resolve().parents[2], Path(sys.prefix), Path(sys.base_prefix))


class LabError(RuntimeError):
    """Something of the lab itself does not work; nothing is said of what runs on its hosts."""


def why_not() -> str | None:
    """Why hosts cannot be made here; None if they can."""
    if os.geteuid() != 0:
        return "hosts are namespaces, and making them takes root"
    for tool in ("unshare", "nsenter", "mount", "ip", "tc"):
        if shutil.which(tool) is None:
            return f"hosts are made by `{tool}`, which is not installed (util-linux, iproute2)"
    try:
        _Space("net", "mount", "pid").end()
        return None
    except LabError as error:
        return f"the kernel gives no namespaces: {error}"


def why_no_memory_limit() -> str | None:
    """Why no host can run out of memory here; None if they can."""
    if not (_MEMORY / "memory.limit_in_bytes").exists():
        return f"memory is bounded by a cgroup of version 1, and there is none at {_MEMORY}"
    if not os.access(_MEMORY, os.W_OK):
        return f"no cgroup can be made in {_MEMORY}"
    return None


def _call(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
    return done.stdout


class _Space:
    """Namespaces, and the process that is the first in them.

    Args:
        kinds: Which namespaces, in `unshare`'s words.
        script: What the first process does before anything else is in there.
    """

    def __init__(self, *kinds: str, script: str = "") -> None:
        # A shell also reaps what dead processes leave, as the first process of a host has to.
        hold = f"set -e\n{script}\necho up\nwhile read -r _; do :; done"
        self._holder = subprocess.Popen(
            ["unshare", *(f"--{kind}" for kind in kinds), "--fork", "bash", "-c", hold],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert self._holder.stdout is not None
        if (said := self._holder.stdout.readline()) != "up\n":
            said += self._holder.communicate()[0]
            raise LabError(said.strip())
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children")
        self.first = int(children.read_text())
        # Its number may be another process's once it has ended, this is never.
        self._power = os.pidfd_open(self.first)
        self.id = os.readlink(f"/proc/{self.first}/ns/pid")

    @property
    def is_alive(self) -> bool:
        return self._holder.poll() is None

    def command(self, *words: str, folder: Path | str = "/tmp") -> list[str]:
        """What runs a command in here."""
        # Left alone, nsenter stops as soon as its command is stopped, and then misses its end;
        # and it forgets the working directory.
        enter = ("nsenter", "-t", str(self.first), "-n", "-m", "-u", "-i", "-p", "--no-fork")
        return [*enter, "--", "env", "-C", str(folder), "sh", "-c", '"$@"; exit $?', "sh", *words]

    def end(self) -> None:
        """Kill the first process, and with it the kernel kills all others, before this returns."""
        if self._power < 0:
            return
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._power, signal.SIGKILL)
        self._holder.wait()
        os.close(self._power)
        self._power = -1
        for pipe in (self._holder.stdin, self._holder.stdout):
            assert pipe is not None
            pipe.close()


class Host:
    """One machine of a lab, which is on when it is made.

    Attributes:
        name: What the others call it.
        address: Its IPv4 address.
        disk: The folder, of this machine, whose `tmp` is the host's `/tmp`. It outlives power cuts.
    """

    def __init__(self, lab: Lab, name: str, address: str) -> None:
        self.name = name
        self.address = address
        self.disk = lab.folder / name
        self._lab = lab
        (self.disk / "tmp/home").mkdir(parents=True)
        self._space = self._boot()

    @property
    def is_on(self) -> bool:
        """Whether it has power."""
        return self._space.is_alive

    def power_on(self) -> None:
        """Boot it: `/tmp` and home are as they were left, `/dev/shm` is empty."""
        if self.is_on:
            raise LabError(f"{self.name} has power already.")
        self._space = self._boot()

    def power_off(self, *, silently: bool = True) -> None:
        """End all its processes at once.

        Args:
            silently: Whether the others are left with open connections, as by a power cut. Else the
                kernel resets them, as when a container is killed.
        """
        if silently and self.is_on:
            self.unplug()
        self._space.end()

    def unplug(self) -> None:
        """Lose all packets from it and to it, without a word: its interface still has a carrier."""
        self._lab.switch("ip", "link", "set", self._cable, "nomaster")

    def plug(self) -> None:
        """Carry packets again."""
        self._lab.switch("ip", "link", "set", self._cable, "master", "bridge")

    def slow(self, rate: str) -> None:
        """Bound what it sends and what it receives by a rate in `tc`'s words, as `10mbit`."""
        limit = ("root", "tbf", "rate", rate, "burst", "32k", "latency", "400ms")
        self._lab.switch("tc", "qdisc", "replace", "dev", self._cable, *limit)
        _call(*self._space.command("tc", "qdisc", "replace", "dev", "eth0", *limit))

    def speed_up(self) -> None:
        """Undo `slow`."""
        self._lab.switch("tc", "qdisc", "del", "dev", self._cable, "root")
        _call(*self._space.command("tc", "qdisc", "del", "dev", "eth0", "root"))

    def start(
        self,
        *command: str,
        log: Path,
        folder: Path | str = "/tmp",
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a command and do not wait for it.

        Args:
            command: Its words.
            log: A file of this machine that its output is appended to.
            folder: Where it runs.
            environment: Variables beside the lab's.

        Returns:
            A process of this machine that ends as the command does. To signal the command itself,
            use `signal`.
        """
        with log.open("ab") as output:
            return subprocess.Popen(
                self._space.command(*command, folder=folder),
                env=self._environment(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(
        self,
        *command: str,
        folder: Path | str = "/tmp",
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command and give its exit code and output."""
        return subprocess.run(
            self._space.command(*command, folder=folder),
            env=self._environment(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def processes(self, title: str = "") -> list[psutil.Process]:
        """Its processes, but for the first, whose command line has some text in it."""
        if not self.is_on:
            return []
        return [
            process
            for process in psutil.process_iter()
            if process.pid != self._space.first
            and _space_of(process) == self._space.id
            and title in _title(process)
        ]

    def signal(self, title: str, number: signal.Signals) -> int:
        """Send a signal to those processes; return how many there were."""
        found = self.processes(title)
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        return len(found)

    def exhaust_memory(self, process: psutil.Process) -> None:
        """Have the kernel kill one of its processes since memory runs out.

        The process gets a bound of 64 MiB for what it takes from now on, and shares it with a
        program that takes all there is. The kernel kills the process first, if that holds more
        than the bound.

        Raises:
            LabError: The kernel killed nothing.
        """
        group = _MEMORY / f"{self._lab.folder.name}-{self.name}"
        group.mkdir()
        hog = subprocess.Popen([sys.executable, "-S", "-c", _HOG], stdin=subprocess.PIPE)
        try:
            (group / "memory.limit_in_bytes").write_text(str(_MEMORY_BYTES))
            Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")
            for number in (process.pid, hog.pid):
                (group / "cgroup.procs").write_text(str(number))
            hog.communicate(b"\n")
            process.wait(_DEATH_S)
        except psutil.TimeoutExpired as error:
            raise LabError(f"{process} outlives the program that took all memory.") from error
        finally:
            hog.kill()
            hog.wait()
            for number in (group / "cgroup.procs").read_text().split():
                (_MEMORY / "cgroup.procs").write_text(number)
            group.rmdir()

    @property
    def _cable(self) -> str:
        return f"to-{self.name}"

    def _boot(self) -> _Space:
        folder = self._lab.folder
        lines = [
            # Names are known without a server: asking for one would wait for nobody.
            f"mount --bind {quote(f'{folder}/hosts')} /etc/hosts",
            f"mount --bind {quote(f'{folder}/resolv.conf')} /etc/resolv.conf",
            *(
                f"mount --rbind {quote(str(kept))} {quote(str(_made(self.disk, kept)))}"
                for kept in self._lab.kept
            ),
            f"mount --rbind {quote(f'{self.disk}/tmp')} /tmp",
            "mount -t tmpfs -o size=512m shm /dev/shm",
            "mount -t proc proc /proc",
            f"hostname {self.name}",
            "ip link set lo up",
        ]
        space = _Space("net", "mount", "uts", "ipc", "pid", script="\n".join(lines))
        self._lab.connect(self._cable, space, self.address)
        return space

    def _environment(self, more: Mapping[str, str] | None) -> dict[str, str]:
        return {**os.environ, **self._lab.environment, "HOME": "/tmp/home", **(more or {})}


class Lab:
    """The switch and its hosts.

    Args:
        folder: An empty folder for the hosts' disks.
        kept: Folders that all hosts share with this machine, beside this project's code and Python.
            Those that are not below `/tmp`, they share anyway.
        environment: Variables of all that runs on hosts, beside those of this process.

    Attributes:
        hosts: By name.
    """

    def __init__(
        self,
        folder: Path,
        *,
        kept: Sequence[Path] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        shared = {each for each in (*_CODE, *kept) if each.is_relative_to("/tmp")}
        self.kept = [each for each in sorted(shared) if shared.isdisjoint(each.parents)]
        self.environment = dict(environment or {})
        self.hosts: dict[str, Host] = {}
        self._numbers = itertools.count(1)
        (folder / "hosts").write_text("127.0.0.1 localhost\n")
        (folder / "resolv.conf").touch()
        self._switch = _Space("net", "pid")
        self.switch("ip", "link", "add", "bridge", "type", "bridge")
        self.switch("ip", "link", "set", "bridge", "up")

    def add(self, name: str) -> Host:
        """Add a host, on and connected."""
        if len(name) > _LONGEST_NAME or name in self.hosts:
            raise LabError(f"{name!r} is taken, or has more than {_LONGEST_NAME} characters.")
        address = f"{_NETWORK}.{next(self._numbers)}"
        with (self.folder / "hosts").open("a") as file:
            file.write(f"{address} {name}\n")
        self.hosts[name] = Host(self, name, address)
        return self.hosts[name]

    def switch(self, *command: str) -> str:
        """Run a command on the switch."""
        return _call("nsenter", "-t", str(self._switch.first), "-n", "--", *command)

    def connect(self, cable: str, space: _Space, address: str) -> None:
        """Lay a new cable between the switch and a host that boots."""
        with suppress(LabError):  # there is none yet, or the kernel has taken it away by now
            self.switch("ip", "link", "del", cable)
        peer = ("peer", "name", "eth0", "netns", str(space.first))
        self.switch("ip", "link", "add", cable, "type", "veth", *peer)
        self.switch("ip", "link", "set", cable, "master", "bridge", "up")
        # The same after each start: the others remember it.
        hardware = f"02:00:00:00:00:{int(address.rpartition('.')[2]):02x}"
        for words in (
            ("link", "set", "eth0", "address", hardware),
            ("addr", "add", f"{address}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
            ("route", "add", "default", "via", _NOWHERE),
        ):
            _call(*space.command("ip", *words))

    def close(self) -> None:
        """End all hosts and the switch."""
        for host in self.hosts.values():
            host.power_off()
        self._switch.end()


@contextmanager
def lab(
    *, kept: Sequence[Path] = (), environment: Mapping[str, str] | None = None
) -> Iterator[Lab]:
    """Have a lab for the length of a `with` block, which leaves nothing behind; see `Lab`."""
    folder = Path(tempfile.mkdtemp(prefix="lab-"))
    made = Lab(folder, kept=kept, environment=environment)
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(folder)


def _made(disk: Path, kept: Path) -> Path:
    """Where a host's disk has what it shares."""
    place = disk / "tmp" / kept.relative_to("/tmp")
    place.mkdir(parents=True, exist_ok=True)
    return place


def _space_of(process: psutil.Process) -> str | None:
    try:
        return os.readlink(f"/proc/{process.pid}/ns/pid")
    except OSError:  # it has ended
        return None


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""
