"""What befalls a cluster. Each fault says what it did, and has undone it when it returns."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from tests.chaos.stand import Stand
from tests.support.ray_hosts import DASHBOARD, NODE, RAYLET, WORKER

NAN = np.float32(np.nan).tobytes()


@dataclass(frozen=True)
class Fault:
    """A kind of fault.

    Attributes:
        inflict: Makes it, waits as long as it lasts, and says what was done.
        ends_driver: Whether the run's command must be given again.
        announced: Whether the run has time to save, so that nothing may be lost.
    """

    inflict: Callable[[Stand, random.Random], str]
    ends_driver: bool = False
    announced: bool = False


def kill_rank(stand: Stand, chance: random.Random) -> str:
    host = chance.choice(stand.cluster.others)
    assert host.signal(WORKER, signal.SIGKILL) == 1
    return f"the rank on {host.name} was killed"


def stop_rank(stand: Stand, chance: random.Random) -> str:
    host = chance.choice(stand.cluster.others)
    assert host.signal(WORKER, signal.SIGSTOP) == 1
    try:
        time.sleep(20)
    finally:
        host.signal(WORKER, signal.SIGCONT)
    return f"the rank on {host.name} stood still for 20 s"


def hang_rank(stand: Stand, chance: random.Random) -> str:
    host = chance.choice(stand.cluster.others)
    assert host.signal(WORKER, signal.SIGSTOP) == 1
    return f"the rank on {host.name} stood still for good"


def kill_raylet(stand: Stand, chance: random.Random) -> str:
    host = chance.choice(stand.cluster.others)
    stand.cluster.expect_restart(host)
    assert host.signal(RAYLET, signal.SIGKILL) == 1
    stand.cluster.wait_until_up(host)
    return f"the raylet of {host.name} was killed; its node began anew"


def cut_power(stand: Stand, chance: random.Random) -> str:
    host, off_s = chance.choice(stand.cluster.others), chance.randint(1, 20)
    host.power_off()
    time.sleep(off_s)
    stand.power_on(host)
    stand.cluster.wait_until_up(host)
    return f"{host.name} was without power for {off_s} s"


def exhaust_memory(stand: Stand, chance: random.Random) -> str:
    host = chance.choice(stand.cluster.others)
    (rank,) = host.processes(WORKER)
    host.exhaust_memory(rank)
    return f"memory ran out on {host.name}: the kernel killed the rank"


def fill_disk(stand: Stand, chance: random.Random) -> str:
    # What the cache holds goes first: a node on which nothing is missing needs no room.
    host = chance.choice(stand.cluster.others)
    (rank,) = host.processes(WORKER)
    with stand.full_cache(host):
        rank.kill()
        stand.wait_for_words("Free some space")
    return f"the rank on {host.name} was killed, its cache emptied, and its disk full for a while"


def spoil_memory(stand: Stand, chance: random.Random) -> str:
    # As a bit flip does: what is not changed by training is not a number from now on.
    host = chance.choice(stand.cluster.others)
    (rank,) = host.processes(WORKER)
    tables = stand.constants()
    rank.suspend()  # or what is free now may be in use when it is written to
    try:
        changed = sum(_overwrite(rank, table, NAN) for table in tables)
    finally:
        rank.resume()
    assert changed >= len(tables)
    return f"memory of the rank on {host.name} was spoiled: its losses were not finite"


def cut_network(stand: Stand, chance: random.Random) -> str:
    host = chance.choice(stand.cluster.hosts)
    host.unplug()
    time.sleep(10)
    host.plug()
    return f"{host.name} was cut off for 10 s"


def lose_network(stand: Stand, chance: random.Random) -> str:
    # Longer than any patience, and then it is back, beside what took its ranks' place.
    host = chance.choice(stand.cluster.others)
    stand.cluster.expect_restart(host)
    host.unplug()
    time.sleep(120)
    host.plug()
    stand.cluster.wait_until_up(host)
    return f"{host.name} was cut off for 120 s; its node began anew"


def slow_network(stand: Stand, chance: random.Random) -> str:
    host = chance.choice(stand.cluster.others)
    host.slow("1mbit")
    time.sleep(20)
    stand.hold_back(host)
    return f"{host.name} had 1 Mbit/s for 20 s"


def terminate_node(stand: Stand, chance: random.Random) -> str:
    host = chance.choice(stand.cluster.others)
    stand.cluster.expect_restart(host)
    assert host.signal(NODE, signal.SIGTERM) == 1
    stand.cluster.wait_until_up(host)
    return f"the node of {host.name} was asked to end by SIGTERM, and began anew"


def take_with_notice(stand: Stand, chance: random.Random) -> str:
    host = chance.choice(stand.cluster.others)
    stand.cluster.drain(host, deadline_s=30)
    time.sleep(30)
    host.power_off()
    stand.power_on(host)
    stand.cluster.wait_until_up(host)
    return f"{host.name} was taken 30 s after a notice, and came back"


def kill_driver(stand: Stand, chance: random.Random) -> str:
    stand.kill_driver()
    return "the driver was killed"


def terminate_driver(stand: Stand, chance: random.Random) -> str:
    stand.terminate_driver()
    return "the driver was asked to end by SIGTERM"


def kill_dashboard(stand: Stand, chance: random.Random) -> str:
    count = stand.cluster.head.signal(DASHBOARD, signal.SIGKILL)
    return "the dashboard was killed" if count else "there was no dashboard left to kill"


def lose_head(stand: Stand, chance: random.Random) -> str:
    _replace_head(stand)
    return "the head was without power, and came back"


def take_head(stand: Stand, chance: random.Random) -> str:
    stand.cluster.drain(stand.cluster.head, deadline_s=120)
    assert stand.wait_for_end() == 128 + signal.SIGTERM
    _replace_head(stand)
    return "the head was taken after a notice, once the driver had ended, and came back"


def _replace_head(stand: Stand) -> None:
    head = stand.cluster.head
    head.power_off()
    for host in stand.cluster.others:
        stand.cluster.expect_restart(host)
    stand.power_on(head)
    for host in stand.cluster.hosts:
        stand.cluster.wait_until_up(host)


def _overwrite(process: psutil.Process, old: bytes, new: bytes) -> int:
    """Put bytes where others begin in the memory of a process; return how often."""
    count = 0
    with Path(f"/proc/{process.pid}/mem").open("r+b", buffering=0) as memory:
        for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
            span, permissions, *_, inode = line.split()[:5]
            if not permissions.startswith("rw") or inode != "0":
                continue
            begin, end = (int(each, 16) for each in span.split("-"))
            memory.seek(begin)
            try:
                held = memory.read(end - begin)
            except OSError:  # it was given back meanwhile
                continue
            place = held.find(old)
            while place >= 0:
                memory.seek(begin + place)
                memory.write(new)
                count += 1
                place = held.find(old, place + 1)
    return count


FAULTS: Mapping[str, Fault] = {
    "rank killed": Fault(kill_rank),
    "rank stopped": Fault(stop_rank),
    "rank hung": Fault(hang_rank),
    "rank spoiled": Fault(spoil_memory),
    "memory exhausted": Fault(exhaust_memory),
    "disk full": Fault(fill_disk),
    "raylet killed": Fault(kill_raylet),
    "power cut": Fault(cut_power),
    "network cut": Fault(cut_network),
    "network lost": Fault(lose_network),
    "network slow": Fault(slow_network),
    "node terminated": Fault(terminate_node, announced=True),
    "node taken": Fault(take_with_notice, announced=True),
    "driver terminated": Fault(terminate_driver, ends_driver=True, announced=True),
    "driver killed": Fault(kill_driver, ends_driver=True),
    "dashboard killed": Fault(kill_dashboard),
    "head lost": Fault(lose_head, ends_driver=True),
    "head taken": Fault(take_head, ends_driver=True, announced=True),
}
"""By name."""
