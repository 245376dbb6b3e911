"""What nodes are, compared before any worker is placed on them and before anything is loaded.

Each node looks at itself in a process of its own (`look_at_node`); the launch compares what came
of it (`judge_nodes`). This module loads without torch, for the launch waits for it on each node.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from cluster.contract import Payload
from cluster.node_check import Judgement, NodeCheck, NodePlace, Sight
from cluster.process_group import interface_of
from pipelines.formats import format_bytes, format_count, format_table
from trainer.config.reading import from_dict
from trainer.metrics.mlflow_backend import file_number, tracking_uri
from trainer.metrics.tracker import TrackingConfig
from trainer.storage.errors import LeaseLost, StoreError
from trainer.storage.lease import MAX_ATTEMPTS, Fence, Lease
from trainer.storage.open import open_store, set_environment
from trainer.storage.store import StoreConfig
from trainer.training.at_once import Look
from trainer.training.builds import SAME_CODE, Build, find_differences, own_build

if TYPE_CHECKING:
    from trainer.config.job import JobConfig

_LITTLE_BYTES = 1 << 30
_ALL_REDUCE_BYTES = 1 << 24
_CLOCK_S = 30.0
_SLOW_NAME_S = 1.0
_ANSWER_S = 10.0
_TRIES = 3
_TRY_AGAIN_S = 1.0
_OF_PROXIES = (407, 502, 503, 504)
"""Answers of HTTP that tell of what is between here and a server."""
_SHARED_MEMORY = Path("/dev/shm")
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@dataclass(frozen=True, kw_only=True)
class NodeReport:
    """One node, as it sees itself.

    Attributes:
        host: Its name.
        device: What a worker computes on there.
        memory_bytes: Memory that programs can still have.
        shared_bytes: What is free in /dev/shm.
        cache_bytes: What is free on the disk of the cache.
        scratch_bytes: What is free on that of temporary files.
        interface: The network interface of collectives; "" where it is not known.
        name_s: How long it takes to look its own name up, in seconds.
        code: SHA-256 of the source of our packages.
        versions: Versions of packages that the ranks must agree in.
        faults: Why it cannot take part, each as a clause.
        warnings: What is amiss, likewise.
        reaches_peer: Whether it reaches the other node that it was told of.
    """

    host: str
    device: str
    memory_bytes: int
    shared_bytes: int
    cache_bytes: int
    scratch_bytes: int
    interface: str
    name_s: float
    code: str
    versions: dict[str, str]
    faults: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    reaches_peer: bool = True


def node_check(job: JobConfig, lease: Lease) -> NodeCheck:
    """Say what to look for on the nodes of a run.

    Args:
        job: The configuration.
        lease: The launch's hold on the run, of which each node is to find the trace in the store.
    """
    from trainer.config import paths
    from trainer.config.reading import to_dict

    home = str(paths.home(job))
    payload = {
        "store": to_dict(job.store),
        "runs": paths.runs_uri(job),
        "lease": asdict(lease),
        "tracking": to_dict(job.tracking),
        "home": home,
        "tracker_file": file_number(job.tracking, home),
        "cache": str(job.shards.cache_dir or paths.cache(job)),
        "scratch": job.cluster.scratch_dir,
    }
    judge = partial(judge_nodes, launch=own_build())
    return NodeCheck(look=look_at_node, payload=payload, judge=judge)


def look_at_node(place: NodePlace, payload: Mapping[str, Any]) -> dict[str, Any]:
    """Look at this node.

    Args:
        place: What it is told of itself.
        payload: Of `node_check`.

    Returns:
        A `NodeReport` as plain values.
    """
    set_environment(from_dict(StoreConfig, payload["store"]))
    store = Look("the store", partial(_look_at_store, payload))
    tracker = Look("MLflow", partial(_look_at_tracker, payload))
    devices = Look("the devices", partial(_look_at_devices, place.gpus))
    peer = Look("another node", partial(_is_reachable, place.peer))
    name = Look("this node's own name", _time_name)
    cache_bytes, cache_faults = _look_at_cache(Path(payload["cache"]))
    own = own_build()

    store_faults, (device, device_faults) = store.take(), devices.take()
    tracker_faults, warnings = tracker.take()
    interface_faults = filter(None, (_interface_fault(name) for name in _INTERFACES))
    report = NodeReport(
        host=socket.gethostname(),
        device=device,
        memory_bytes=psutil.virtual_memory().available,
        shared_bytes=shutil.disk_usage(_SHARED_MEMORY).free if _SHARED_MEMORY.exists() else 0,
        cache_bytes=cache_bytes,
        scratch_bytes=free_scratch(payload["scratch"]),
        interface=os.environ.get(_INTERFACES[0]) or interface_of(place.address or "127.") or "",
        name_s=name.take(),
        code=own.code,
        versions=dict(own.versions),
        faults=(
            *(*store_faults, *cache_faults, *device_faults),
            *(*tracker_faults, *interface_faults),
        ),
        warnings=tuple(warnings),
        reaches_peer=peer.take(),
    )
    return asdict(report)


def _look_at_store(payload: Mapping[str, Any]) -> list[str]:
    """Find the launch in the store, and write there, as each worker will."""
    config = from_dict(StoreConfig, payload["store"])
    # Why it is out of reach is to be told before the launch takes this node for silent.
    quick = replace(
        config,
        retries=min(2, config.retries),
        connect_timeout_s=min(_ANSWER_S, config.connect_timeout_s),
        read_timeout_s=min(_ANSWER_S, config.read_timeout_s),
    )
    store = open_store(payload["runs"], quick)
    lease = Lease(**payload["lease"])
    try:
        Fence(store, lease, attempt=MAX_ATTEMPTS).check()
        probe = f"{lease.run}/probe-{lease.launch}-{socket.gethostname()}-{os.getpid()}"
        store.put(probe, b"written to see whether this node can write to the store")
        store.delete(probe)
    except (LeaseLost, StoreError) as error:
        return [str(error).rstrip(".")]
    return []


def _look_at_cache(folder: Path) -> tuple[int, list[str]]:
    """Return what is free for the cache, in bytes, and what is wrong with it."""
    place = f"the cache folder {folder}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        can_write = os.access(folder, os.W_OK)
        faults = [] if can_write else [f"{place} cannot be written (home, shards.cache_dir)"]
        return shutil.disk_usage(folder).free, faults
    except OSError as error:
        return 0, [f"{place} cannot be made: {error} (home, shards.cache_dir)"]


def _look_at_devices(wanted: int) -> tuple[str, list[str]]:
    """Return what a worker computes on, and what is wrong with it: fewer GPUs than are wanted."""
    if wanted == 0:
        return "cpu", []
    try:
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(
            asked, capture_output=True, text=True, timeout=2 * _ANSWER_S, check=False
        )
    except FileNotFoundError:  # a container may have the driver without it
        return format_count(wanted, "GPU"), []
    except subprocess.TimeoutExpired:
        fault = "nvidia-smi does not answer: look at the driver, or restart the node"
        return format_count(wanted, "GPU"), [fault]
    names = done.stdout.strip().splitlines() if done.returncode == 0 else []
    faults = []
    if len(names) < wanted:
        said = "" if names else f" ({(done.stderr or done.stdout).strip()[:200]})"
        are = "GPU is" if wanted == 1 else "GPUs are"
        faults.append(
            f"{wanted} {are} wanted there, and its driver shows {len(names)}{said}: look at "
            "nvidia-smi, and at --num-gpus of `ray start`"
        )
    return f"{len(names)} x {names[0]}" if names else "no GPU", faults


def _look_at_tracker(payload: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """See whether the first rank could tell MLflow from here; any node may have it.

    Returns:
        Faults, and warnings.
    """
    faults, warnings = list[str](), list[str]()
    config = from_dict(TrackingConfig, payload["tracking"])
    uri = tracking_uri(config, payload["home"])
    own, there = file_number(config, payload["home"]), payload["tracker_file"]
    if there is not None and own != there:
        faults.append(
            f"MLflow's file {uri} is one of the machine where the run was started, and "
            f"{'not there' if own is None else 'another'} here: give an MLflow server that all "
            "reach, tracking.uri=http://HOST:5000"
        )
    if uri.startswith(("http://", "https://")) and (why := _why_silent(f"{uri}/health")):
        text = f"MLflow at tracking.uri={uri} is not reached ({why})"
        if config.required:
            faults.append(f"{text}; tracking.required=false trains without waiting for it")
        else:
            warnings.append(text)
    return faults, warnings


def _why_silent(url: str) -> str | None:
    """Why no server answers at an address as MLflow's client asks it; None if one does.

    What it answers does not count, but that only a proxy before it does, and goes on doing so:
    where a server starts again, a proxy answers for a moment.
    """
    for _ in range(_TRIES - 1):
        why, is_of_proxy = _ask(url)
        if not is_of_proxy:
            return why
        time.sleep(_TRY_AGAIN_S)
    return _ask(url)[0]


def _ask(url: str) -> tuple[str | None, bool]:
    """Why no server answers, and whether a proxy says so."""
    import requests

    settings = os.environ
    is_insecure = settings.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1")
    try:
        with requests.get(
            url,
            timeout=_ANSWER_S,
            verify=settings.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or not is_insecure,
            cert=settings.get("MLFLOW_TRACKING_CLIENT_CERT_PATH"),
            stream=True,
        ) as answer:
            if answer.status_code in _OF_PROXIES:
                return f"{answer.status_code} {answer.reason}", True
            return None, False
    except (OSError, ValueError) as error:
        inner = error.args[0] if error.args else error
        return str(getattr(inner, "reason", None) or error), False


def _interface_fault(variable: str) -> str | None:
    """Why collectives cannot use the interface that the environment names, if it names one."""
    value = os.environ.get(variable, "")
    if not value or value.startswith("^"):
        return None
    own = list(psutil.net_if_addrs())
    names = value.removeprefix("=").split(",")
    # NCCL takes the beginning of a name for it, unless "=" says otherwise.
    is_prefix = variable.startswith("NCCL") and not value.startswith("=")
    if any(one == name or (is_prefix and one.startswith(name)) for name in names for one in own):
        return None
    return f"{variable}={value} names no network interface that it has ({', '.join(own)})"


def _is_reachable(door: str) -> bool:
    """Tell whether something listens at HOST:PORT; where there is nothing to reach, it does."""
    if not door:
        return True
    host, _, port = door.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_S).close()
    except OSError:
        return False
    return True


def _time_name() -> float:
    began = time.monotonic()
    with suppress(OSError):  # who looks up a name that nobody knows finds out at once
        socket.getaddrinfo(socket.gethostname(), None)
    return time.monotonic() - began


def free_scratch(folder: str | None) -> int:
    """Return what is free for temporary files, in bytes.

    Args:
        folder: `cluster.scratch_dir`. Where a node lacks it, as in a cluster that was joined and
            has its own, the system's place counts.
    """
    try:
        return shutil.disk_usage(folder or tempfile.gettempdir()).free
    except OSError:
        return shutil.disk_usage(tempfile.gettempdir()).free


def judge_nodes(sights: Sequence[Sight], *, launch: Build) -> Judgement:
    """Say which nodes cannot take part and why, and what else is amiss.

    Args:
        sights: What came of the look at each. In packages that the launch does without, those that
            answered are compared with the first.
        launch: What the launch runs, and each node has to.
    """
    reports = {
        sight.node: report for sight in sights if (report := _read(sight.report)) is not None
    }
    first = next(iter(reports.values()), None)
    unfit: dict[str, tuple[str, ...]] = {}
    warnings: dict[str, tuple[str, ...]] = {}
    for sight in sights:
        if (report := reports.get(sight.node)) is None or first is None:
            unfit[sight.node] = (_why_unread(sight),)
            continue
        differences = find_differences(
            Build(code=report.code, versions=report.versions),
            launch,
            others=first.versions,
            whose=first.host,
        )
        faults = [*report.faults, *differences]
        if not report.reaches_peer and sight.peer in reports:
            faults.append(
                f"it does not reach {reports[sight.peer].host} at {sight.place.peer}: let nodes "
                "reach each other at all ports from 1024 on"
            )
        if faults:
            unfit[sight.node] = tuple(f"{report.host}: {fault}" for fault in faults)
        warnings[sight.node] = tuple(find_shortages(report, sight))
    return Judgement(unfit=unfit, warnings=warnings, table=node_table(sights, reports))


def _read(report: Payload | None) -> NodeReport | None:
    try:
        return None if report is None else NodeReport(**report)
    except TypeError:  # another version of this module tells other things
        return None


def _why_unread(sight: Sight) -> str:
    if sight.report is None:
        return f"{sight.place.address}: {sight.error}"
    host = sight.report.get("host", sight.place.address)
    return f"{host}: its code is another than that of the launch; {SAME_CODE}"


def find_shortages(node: NodeReport, sight: Sight) -> list[str]:
    """Say what is scarce, or amiss, on a node that can take part."""
    workers = max(1, sight.place.workers)
    kinds: Mapping[str, int] = {
        "memory": node.memory_bytes // workers,
        "disk of the cache": node.cache_bytes,
        "disk of temporary files": node.scratch_bytes,
    }
    # NCCL's ranks of one node exchange their data there.
    if workers > 1 and sight.place.gpus:
        kinds = {**kinds, "/dev/shm": node.shared_bytes}
    found = [f"{node.host}: {text}" for text in node.warnings]
    found += [
        f"{node.host} has only {format_bytes(free)} left of its {kind}"
        + (" for each worker" if kind == "memory" else "")
        for kind, free in kinds.items()
        if free < _LITTLE_BYTES
    ]
    if abs(sight.ahead_s) > _CLOCK_S:
        found.append(
            f"the clock of {node.host} is {sight.ahead_s:+.0f} s from that of the launch; stores "
            "refuse requests of clocks that are far off"
        )
    if node.name_s > _SLOW_NAME_S:
        found.append(
            f"{node.host} takes {node.name_s:.1f} s to look its own name up; put it into /etc/hosts"
        )
    return found


def node_table(sights: Sequence[Sight], reports: Mapping[str, NodeReport]) -> str:
    """Lay the nodes that answered out as a table."""
    head = ("node", "room", "device", "memory free", "/dev/shm", "cache", "tmp", "net", "clock")
    rows = [
        (
            node.host,
            str(sight.place.workers),
            node.device,
            *map(format_bytes, (node.memory_bytes, node.shared_bytes)),
            *map(format_bytes, (node.cache_bytes, node.scratch_bytes)),
            node.interface or "-",
            f"{sight.ahead_s:+.1f} s",
        )
        for sight in sights
        if (node := reports.get(sight.node)) is not None
    ]
    return format_table([head, *rows], align="<><>>>><>")


def measure_all_reduce(device: str) -> str:
    """Say how fast the ranks add up a buffer over all of them; a collective call.

    Args:
        device: Where this rank computes.
    """
    # Not for the nodes, which only look at themselves.
    import torch
    import torch.distributed as dist

    buffer = torch.zeros(_ALL_REDUCE_BYTES // 4, device=device)
    seconds = 0.0
    for _ in range(2):  # connections are made in the first
        began = time.monotonic()
        dist.all_reduce(buffer)
        buffer[0].item()
        seconds = time.monotonic() - began
    return (
        f"all-reduce of {format_bytes(_ALL_REDUCE_BYTES)} over {dist.get_world_size()} ranks: "
        f"{seconds * 1000:.0f} ms"
    )
