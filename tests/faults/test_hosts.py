"""The hosts that tests of clusters stand on: apart from each other, and faulty when told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.hosts import Host, Lab, lab, why_no_memory_limit, why_not

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
]

PORT = 7000
HEAR = """
import socket
port = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
port.bind(("", 7000))
print("ready", flush=True)
while True:
    print("heard", port.recv(100).decode(), flush=True)
"""
SAY = """
import socket, sys
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(sys.argv[2].encode(), (sys.argv[1], 7000))
"""
TAKE = """
import socket
server = socket.create_server(("", 7000))
print("ready", flush=True)
while True:
    with server.accept()[0] as connection:
        print("connected", flush=True)
        while connection.recv(1 << 16):
            pass
        connection.sendall(b"all of it")
"""
GIVE = """
import socket, sys
with socket.create_connection((sys.argv[1], 7000)) as connection:
    connection.sendall(bytes(int(sys.argv[2])))
    connection.shutdown(socket.SHUT_WR)
    assert connection.recv(100) == b"all of it"
"""
HOLD = """
import time
held = bytearray(b"x") * 2**27
print("ready", flush=True)
time.sleep(1234)
"""
CONNECT = """
import socket, sys
with socket.create_connection((sys.argv[1], 7000)) as connection:
    print("ready", flush=True)
    try:
        connection.recv(1)
    finally:
        print("ended", flush=True)
"""


@pytest.fixture(scope="module")
def own_lab() -> Iterator[Lab]:
    with lab(environment={"COLOUR": "blue"}) as made:
        made.add("one")
        made.add("two")
        yield made


@pytest.fixture
def hosts(own_lab: Lab) -> Iterator[tuple[Host, Host]]:
    """Two hosts that run nothing."""
    one, two = own_lab.hosts.values()
    yield one, two
    for host in (one, two):
        if host.is_on:
            host.power_off()
        host.power_on()


def python(host: Host, code: str, *words: str, log: Path) -> subprocess.Popen[bytes]:
    """Run some code on a host until it says that it is ready."""
    process = host.start(sys.executable, "-S", "-c", code, *words, log=log)
    wait_for("ready", log, process)
    return process


def wait_for(text: str, log: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 540
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


def say(host: Host, to: str, text: str) -> None:
    done = host.run(sys.executable, "-S", "-c", SAY, to, text)
    assert done.returncode == 0, done.stderr


def test_each_has_its_own_name_processes_and_folders_and_shares_what_is_kept(
    tmp_path: Path,
) -> None:
    with lab(kept=[tmp_path], environment={"COLOUR": "blue"}) as made:
        one, two = made.add("one"), made.add("two")
        assert (one.address, two.address) == ("10.231.0.1", "10.231.0.2")
        assert one.run("hostname").stdout == "one\n"
        assert one.run("sh", "-c", "echo $COLOUR $HOME").stdout == "blue /tmp/home\n"
        assert "10.231.0.2" in one.run("getent", "hosts", "two").stdout
        for file in ("/tmp/a", "/dev/shm/b", str(tmp_path / "c")):
            assert one.run("touch", file).returncode == 0
        assert two.run("ls", "/tmp/a", "/dev/shm/b").stdout == ""
        assert two.run("ls", str(tmp_path)).stdout == "c\n"
        assert (tmp_path / "c").exists()
        assert not Path("/tmp/a").exists()
        two.start("sleep", "1000", log=tmp_path / "log")
        assert "sleep" not in one.run("ps", "ax").stdout
        # A cut loses memory and keeps the disk.
        one.power_off()
        assert not one.is_on
        one.power_on()
        assert one.run("ls", "/tmp/a", "/dev/shm/b").stdout == "/tmp/a\n"


def test_packets_of_an_unplugged_host_are_lost(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    one, two = hosts
    log = tmp_path / "log"
    hearing = python(two, HEAR, log=log)
    say(one, two.name, "before")
    wait_for("heard before", log, hearing)
    two.unplug()
    say(one, two.name, "meanwhile")
    two.plug()
    deadline = time.monotonic() + 540
    while "heard after" not in log.read_text():
        assert time.monotonic() < deadline
        say(one, two.name, "after")
    assert "meanwhile" not in log.read_text()


def test_a_power_cut_is_silent_and_a_kill_is_not(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    one, two = hosts
    for silently in (False, True):
        log = tmp_path / f"silently-{silently}"
        taking = python(two, TAKE, log=tmp_path / "server")
        connected = python(one, CONNECT, two.name, log=log)
        wait_for("connected", tmp_path / "server", taking)
        (tmp_path / "server").unlink()
        two.power_off(silently=silently)
        if silently:
            # What the kernel had to say about the connection it had said before that returned.
            assert connected.poll() is None
            assert "ended" not in log.read_text()
            assert one.run("cat", "/proc/net/tcp").stdout.count(f":{PORT:04X} 01") == 1
        else:
            assert connected.wait(540) == 0
            assert "ended" in log.read_text()
        two.power_on()


def test_a_slow_host_takes_its_time_in_both_directions(
    hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    one, two = hosts
    size = 300_000
    python(one, TAKE, log=tmp_path / "one")
    python(two, TAKE, log=tmp_path / "two")
    two.slow("2mbit")
    least_s = (size - 64_000) * 8 / 2e6  # a burst goes at once
    for giver, taker in ((one, two), (two, one)):
        began = time.monotonic()
        done = giver.run(sys.executable, "-S", "-c", GIVE, taker.name, str(size))
        assert done.returncode == 0, done.stderr
        assert time.monotonic() - began > least_s
    two.speed_up()


def test_signals_reach_processes_by_their_title(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    one, two = hosts
    sleeps = {host: host.start("sleep", "1234", log=tmp_path / "log") for host in hosts}
    other = one.start("sleep", "4321", log=tmp_path / "log")
    while len([*one.processes("sleep"), *two.processes("sleep")]) < 3:
        time.sleep(0.01)
    (process,) = one.processes("sleep 1234")
    assert one.signal("sleep 1234", signal.SIGSTOP) == 1
    while process.status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)
    assert one.signal("sleep 1234", signal.SIGKILL) == 1
    assert sleeps[one].wait(540) == 128 + signal.SIGKILL
    assert other.poll() is None
    assert sleeps[two].poll() is None


@pytest.mark.skipif(why_no_memory_limit() is not None, reason=why_no_memory_limit() or "")
def test_memory_runs_out_for_one_process(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    host, _ = hosts
    large = python(host, HOLD, log=tmp_path / "large")
    other = python(host, HOLD, "other", log=tmp_path / "other")
    groups = set(Path("/sys/fs/cgroup/memory").iterdir())
    (process,) = (each for each in host.processes("held") if each.cmdline()[-1] != "other")
    host.exhaust_memory(process)
    assert large.wait(540) == 128 + signal.SIGKILL
    assert other.poll() is None
    assert set(Path("/sys/fs/cgroup/memory").iterdir()) == groups


MAKER = """
import os, sys, time
from pathlib import Path
from tests.support.hosts import lab
with lab() as made:
    made.add("one").start("sleep", "1000", log=Path(os.devnull))
    while not (found := made.hosts["one"].processes("sleep")):
        time.sleep(0.01)
    print(made.folder, made.hosts["one"]._space.first, made._switch.first, found[0].pid, flush=True)
    if sys.argv[1] == "stay":
        time.sleep(1000)
"""


def machine() -> tuple[set[str], set[str]]:
    """This machine's interfaces and mounts, but for the disks of tests that run beside this one."""
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    return set(psutil.net_if_addrs()), {line for line in mounts if "/pytest-of-" not in line}


@pytest.mark.parametrize("end", ["leave", "stay"])
def test_nothing_is_left_when_it_ends_nor_when_its_maker_is_killed(end: str) -> None:
    before = machine()
    maker = subprocess.Popen(
        [sys.executable, "-c", MAKER, end],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert maker.stdout is not None
    folder, *pids = maker.stdout.readline().split()
    assert len(pids) == 3
    if end == "stay":
        maker.kill()
    maker.wait()
    maker.stdout.close()
    for pid in pids:
        while psutil.pid_exists(int(pid)):
            time.sleep(0.01)
    assert (Path(folder).exists()) == (end == "stay")  # there was nobody to remove it
    if end == "stay":
        subprocess.run(["rm", "-r", folder], check=True)
    assert machine() == before
