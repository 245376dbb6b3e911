"""The connection to Ray: joins a running cluster, or starts a private one and ends it again.

A private cluster lives on this machine alone. Everything of it listens on 127.0.0.1: the control
server (GCS), the raylet, the agents and every worker, on ports chosen at random; there is no
dashboard. Ray also asks for a token, which it keeps in ~/.ray/auth_token (`RAY_AUTH_MODE=disabled`
turns that off). The daemons are children of this process. They ignore the terminal's Ctrl-C,
inherit the environment (credentials too, so none has to be passed on) and are ended by the kernel
when this process dies, the last of them a minute later. A SIGTERM ends them, though: it must go to
this process alone, which then stops the workers, and not to its process group or control group
(systemd: `KillMode=mixed`).

A joined cluster is only left again, which ends this run's workers and nothing else. Its workers
find the caller's modules when the caller is a Ray job (`ray job submit --working-dir . -- python -m
…` ships the code), or when the directory the caller was started in has the same path on every node;
nothing is uploaded from here.
"""

import contextlib
import logging
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray
from ray._private import ray_constants
from ray._private.utils import read_ray_address

from cluster.capacity import Node, resources
from cluster.contract import ClusterConfig, ClusterConfigError, ClusterUnavailable
from cluster.ray_nodes import answers, live_nodes

_OBJECT_STORE_BYTES = 200 * 2**20
"""Ray's shared memory here: it only carries the worker function and messages."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Session:
    """A live connection to Ray.

    Attributes:
        private: Whether the cluster was started here.
        nodes: The live nodes.
        scratch: The run's temporary directory.
    """

    private: bool
    nodes: tuple[Node, ...]
    scratch: Path


@contextlib.contextmanager
def session(config: ClusterConfig) -> Iterator[Session]:
    """Connects to Ray for the time of the block.

    Ray's logs of a private cluster are kept, and named in the log, if the block raises anything but
    a ValueError.

    Raises:
        ClusterConfigError: RAY_ADDRESS is not an address to join, or `config.scratch_dir` cannot be
            written.
        ClusterUnavailable: This process is connected already, or no cluster was reached or started.
    """
    if ray.is_initialized():
        raise ClusterUnavailable(
            "This process is connected to Ray already. Call ray.shutdown() first; to run on that "
            "cluster set cluster.address to its host:port."
        )
    scratch = _scratch(config.scratch_dir)
    children = psutil.Process().children()
    daemons: list[psutil.Process] = []
    private = False
    keep = False
    try:
        with _signal_handlers_kept():
            private = _connect(config, scratch)
        daemons = [child for child in psutil.Process().children() if child not in children]
        yield Session(private=private, nodes=live_nodes(), scratch=scratch)
    except Exception as error:
        keep = private and not isinstance(error, ValueError)
        raise
    finally:
        workers = [worker for daemon in daemons for worker in _descendants(daemon)]
        ray.shutdown()
        # Left alone, the workers of a private cluster notice only seconds later that it is gone.
        _end(daemons + workers)
        if keep:
            _log.warning("Ray's logs are kept in %s/ray/session_latest/logs.", scratch)
        else:
            shutil.rmtree(scratch, ignore_errors=True)


def _scratch(parent: str | None) -> Path:
    try:
        if parent is not None:
            Path(parent).mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="lapflow-", dir=parent))
    except OSError as error:
        raise ClusterConfigError(
            f"cluster.scratch_dir={parent} cannot be written: {error}. Choose another folder."
        ) from error


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _end(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=5)


def _connect(config: ClusterConfig, scratch: Path) -> bool:
    """Joins or starts a cluster; True if it was started."""
    began = time.monotonic()
    address = address_to_join(config)
    if address is None:
        _start(config, scratch)
    else:
        _join(address, found=config.address == "auto")
    nodes = live_nodes()
    _log.info(
        "%s: %d node(s), %s (%.1f s).",
        "Started a private Ray cluster" if address is None else f"Joined the Ray cluster {address}",
        len(nodes),
        resources(sum(n.cpus for n in nodes), sum(n.gpus for n in nodes)),
        time.monotonic() - began,
    )
    return address is None


def address_to_join(config: ClusterConfig) -> str | None:
    """The address of the cluster to join; None to start one.

    Raises:
        ClusterConfigError: RAY_ADDRESS is not an address to join.
    """
    if config.address != "auto":
        return None if config.address == "local" else config.address
    address = os.environ.get("RAY_ADDRESS")
    if address is not None and "://" in address:
        raise ClusterConfigError(
            f"RAY_ADDRESS is {address!r}, the address of a job server. Submit this command to it "
            "with `ray job submit --working-dir . -- …`, or unset RAY_ADDRESS to run here."
        )
    if address:
        return None if address == "local" else address
    left: str | None = read_ray_address()
    if left and not answers(left):
        _log.warning("The cluster that `ray start` left at %s does not answer; ignoring it.", left)
        return None
    return left


def _join(address: str, *, found: bool) -> None:
    try:
        if not answers(address):
            raise ConnectionError("nothing answers there.")
        # Without an address Ray itself reads the environment and then what `ray start` left, and
        # only then takes up a token by itself.
        ray.init(
            address=None if found else address, log_to_driver=False, logging_level=logging.ERROR
        )
    except (OSError, RuntimeError, ray.exceptions.RayError) as error:
        raise ClusterUnavailable(
            f"The Ray cluster at {address} cannot be joined: {error} Check that it runs and that "
            "its version of Ray and its RAY_AUTH_MODE are this environment's; set "
            "cluster.address=local to start a private cluster instead."
        ) from error


def _start(config: ClusterConfig, scratch: Path) -> None:
    # On Linux Ray replaces 127.0.0.1 by the address the host is reached by, unless it believes that
    # it cannot form clusters here, as on macOS.
    reachable = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        ray.init(
            address="local",
            num_cpus=max(config.workers * config.cpus_per_worker, os.cpu_count() or 1),
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
            # Ray opens its directory to everybody; the one around it is ours alone.
            _temp_dir=str(scratch / "ray"),
            # The workers get an environment of their own, so processes started ahead are of no use.
            _system_config={"prestart_worker_first_driver": False},
        )
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ClusterUnavailable(
            f"No private Ray cluster could be started in {scratch}: {error} Check the free memory, "
            "disk and length of that path (cluster.scratch_dir), or use cluster.backend=local."
        ) from error
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = reachable


@contextlib.contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Undoes what ray.init does to the caller's signal handlers."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
