import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from cluster.process_group import default_environment, interface_of, leave, listen

LEAVE = """
import gc, sys
from pathlib import Path
from cluster.process_group import RankInfo, Rendezvous, join, leave
file = Path(sys.argv[1])
meeting = Rendezvous(place=str(file), timeout_s=60, secret=b"secret")
alone = RankInfo(rank=0, world_size=1, local_rank=0, local_world_size=1)
join(alone, meeting, device="cpu", threads=1)
leave()
gc.collect()
assert file.exists()
file.unlink()
file.parent.rmdir()
"""

MEET = """
import os, sys, threading
from pathlib import Path
from cluster import process_group
from cluster.process_group import COLLECTIVE_TIMEOUT, RankInfo, Rendezvous, WorkersAbsent
from cluster.process_group import join, leave, listen, meet

def place_of(rank, size):
    return RankInfo(rank=rank, world_size=size, local_rank=rank, local_world_size=size)

def at(place, timeout_s=1):
    return Rendezvous(place=place, timeout_s=timeout_s, secret=b"secret")

def wait_in_vain(name, rank, size, place, listener=None, timeout_s=1):
    meeting = at(place, timeout_s)
    try:
        join(place_of(rank, size), meeting, device="cpu", threads=1, listener=listener)
    except WorkersAbsent as absent:
        print(f"{name}: {absent.ranks} {absent}", flush=True)

folder = Path(sys.argv[1])
join(place_of(0, 1), at(str(folder / "alone"), 60), device="cpu", threads=1)
import torch, torch.distributed as dist
kept = dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout
print("collectives:", kept == COLLECTIVE_TIMEOUT)
leave()

wait_in_vain("file", 0, 2, str(folder / "file"))
listener = listen("127.0.0.1")
place = listener.getsockname()
others = [
    threading.Thread(target=meet, args=(place_of(rank, 5), at(place, 60)), daemon=True)
    for rank in (1, 4)
]
for other in others:
    other.start()
wait_in_vain("store", 0, 5, place, listener, timeout_s=6)  # those that come need a moment

mute = listen("127.0.0.1")
wait_in_vain("mute", 1, 2, mute.getsockname())

threading.Thread(target=meet, args=(place_of(1, 2), at(str(folder / "still"), 60))).start()
wait_in_vain("still", 0, 2, str(folder / "still"))
os._exit(0)
"""


def test_any_loopback_address_is_the_loopback_interface():
    loopback = interface_of("127.0.0.1")
    assert loopback is not None
    assert interface_of("127.0.0.9") == loopback


def test_every_address_of_this_machine_is_found():
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if not entry.address.startswith("127."):
                assert interface_of(entry.address) == name


def test_an_address_of_another_machine_has_no_interface():
    assert interface_of("192.0.2.200") is None


def test_communicators_of_several_streams_start_in_the_order_of_the_program():
    order = {"NCCL_LAUNCH_ORDER_IMPLICIT": "1"}
    of_gloo = default_environment("cpu", "127.0.0.1")
    assert of_gloo == {"GLOO_SOCKET_IFNAME": interface_of("127.0.0.1")}
    assert default_environment("cuda:3", "127.0.0.1") == of_gloo | order
    assert default_environment("cuda:0", "192.0.2.200") == order


def test_the_rendezvous_listens_on_the_given_address_alone():
    with listen("127.0.0.1") as listener:
        host, port = listener.getsockname()
    assert host == "127.0.0.1"
    assert port > 0


def test_leaving_without_having_joined_does_nothing():
    leave()


@pytest.mark.slow
def test_who_has_left_looks_for_the_rendezvous_no_more(tmp_path: Path) -> None:
    """What signs off in the file does so when the process ends, and then the folder may be gone."""
    folder = tmp_path / "meeting"
    folder.mkdir()
    command = [sys.executable, "-c", LEAVE, str(folder / "rendezvous")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, folder.exists()) == (0, False), done.stderr


@pytest.mark.slow
def test_who_waits_in_vain_for_others_says_for_whom_and_does_so_in_time(tmp_path: Path) -> None:
    """Whoever is missing, wherever they meet, and also where one comes and then stands still."""
    command = [sys.executable, "-c", MEET, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    told = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert sorted(told) == ["collectives", "file", "mute", "still", "store"], done.stderr
    assert told["collectives"] == "True"
    assert told["file"].startswith("(1,) 1 of 2 workers did not come to meet the others within 1 s")
    assert told["file"].endswith(": worker 1")
    assert told["store"].startswith("(2, 3) 2 of 5 workers did not come")
    assert told["mute"].startswith("(0,) 1 of 2 workers")
    assert told["still"].startswith("() All 2 workers came, and could not connect")


def test_a_worker_may_open_a_connection_to_each_other_one_or_says_why_not() -> None:
    """With the limits of a process of its own, that begins with what a shell often gives."""
    code = """
import resource
from cluster.process_group import allow_connections
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 5000))
allow_connections(1000)
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
try:
    allow_connections(4096)
except RuntimeError as error:
    print(error)
"""
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert told[0] == "5000"
    assert "may open 5,000 files here, and connections to 4,096 workers take 16,640" in told[1]
