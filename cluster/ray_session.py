"""The connection to Ray: joins a running cluster, or starts a private one and ends it again.

A private cluster lives on this machine alone, for the length of the run (`cluster.ray_private`).

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
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray._private.utils import read_ray_address

from cluster.assignment import Node, format_resources
from cluster.contract import ClusterConfig, ClusterConfigError, ClusterUnavailable
from cluster.doors import open_door_warning
from cluster.ray_nodes import is_reachable, live_nodes
from cluster.ray_private import private_cluster
from cluster.scratch import make_scratch

_IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""What Ray sets for the command of a job."""
_LOOK_S = 1.0

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
def session(config: ClusterConfig, report: Callable[[str], None]) -> Iterator[Session]:
    """Connects to Ray for the time of the block.

    Args:
        config: Which cluster, or that it is to be started.
        report: Takes a line for a person once it is there.

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
    scratch = make_scratch(config.scratch_dir)
    keep = False
    _end_with_entrypoint()
    try:
        with _connect(config, scratch, report) as private:
            connected = Session(private=private, nodes=live_nodes(), scratch=scratch)
            try:
                yield connected
            except Exception as error:
                keep = private and not isinstance(error, ValueError)
                if not private and not isinstance(error, ValueError):
                    _tell_logs(connected.nodes)
                raise
    finally:
        if keep:
            _log.warning("Ray's logs are kept in %s/ray/session_latest/logs.", scratch)
        else:
            shutil.rmtree(scratch, ignore_errors=True)


def _tell_logs(nodes: Sequence[Node]) -> None:
    """Says where a cluster that was joined keeps its logs, as far as it is there to be asked."""
    node = ray.worker.global_worker.node
    if node is not None:
        places = ", ".join(each.address for each in nodes)
        # Named after the session, which all nodes share.
        folder = node.get_logs_dir_path()
        _log.warning("Ray's logs are in %s on each of its nodes: %s.", folder, places)


@contextlib.contextmanager
def _connect(config: ClusterConfig, scratch: Path, report: Callable[[str], None]) -> Iterator[bool]:
    """Joins or starts a cluster for the time of the block; gives True if it was started."""
    began = time.monotonic()
    address = address_to_join(config)
    with contextlib.ExitStack() as at_last:
        with _keep_signal_handlers():
            if address is None:
                at_last.enter_context(private_cluster(config, scratch))
            else:
                at_last.callback(ray.shutdown)
                _join(address, found=config.address == "auto")
        nodes = live_nodes()
        has = format_resources(sum(n.cpus for n in nodes), sum(n.gpus for n in nodes))
        report(
            f"Ray: {'started on this machine' if address is None else f'joined {address}'}, "
            f"{len(nodes)} node{'s' * (len(nodes) > 1)}, {has} ({time.monotonic() - began:.1f} s)"
        )
        if address is not None:
            server = ray.worker.global_worker.node.address_info.get("webui_url")
            hosts = [node.address for node in nodes]
            if word := open_door_warning(hosts, server, has_token=is_token_auth_enabled()):
                report(word)
        yield address is None


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
    if left and not is_reachable(left):
        _log.warning("The cluster that `ray start` left at %s does not answer; ignoring it.", left)
        return None
    return left


def _join(address: str, *, found: bool) -> None:
    try:
        if not is_reachable(address):
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


def _end_with_entrypoint() -> None:
    """Has the driver of a Ray job asked to stop once its shell is gone.

    Ray takes the shell's end for the job's, and then nobody watches the driver any more.
    """
    if _IN_A_JOB not in os.environ:
        return
    shell = os.getppid()

    def watch() -> None:
        while os.getppid() == shell:
            time.sleep(_LOOK_S)
        _log.warning("The job's entrypoint has ended, and this command with it.")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="entrypoint", daemon=True).start()


@contextlib.contextmanager
def _keep_signal_handlers() -> Iterator[None]:
    """Undoes what ray.init does to the caller's signal handlers."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
