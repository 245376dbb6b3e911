"""A private Ray cluster: started on this machine for one run, and ended with everything of it.

Everything of it listens on 127.0.0.1: the control server (GCS), the raylet, the agents and every
worker, on ports chosen at random; there is no dashboard. Ray also asks for a token, which is made
for this cluster and lies in its own folder, where nobody else can read it
(`RAY_AUTH_MODE=disabled` turns that off). The daemons are children of this process. They ignore the
terminal's Ctrl-C, inherit the environment (credentials too, so none has to be passed on) and are
ended by the kernel when this process dies, the last of them a minute later. A SIGTERM ends them,
though: it must go to this process alone, which then stops the workers, and not to its process group
or control group (systemd: `KillMode=mixed`).
"""

import contextlib
import logging
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private import node, parameter, ray_constants, services
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

from cluster.contract import ClusterConfig, ClusterUnavailable
from cluster.tested import replaced

_OBJECT_STORE_BYTES = 200 * 2**20
"""Ray's shared memory here: it only carries the worker function and messages."""
_AUTHENTICATION = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
_LOG_LINES = 5
_AGENT = Path(__file__).with_name("ray_agent.py")
"""What the raylet runs in the place of Ray's agent."""
_START_ERRORS = (OSError, RuntimeError, ValueError, ray.exceptions.RayError)

# Ray reports what it is used for unless told otherwise. Users can override.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def private_cluster(config: ClusterConfig, scratch: Path) -> Iterator[None]:
    """Starts a cluster, connects to it, and ends it after the block.

    Args:
        config: How many CPUs it is to have, and how long its second start may take.
        scratch: An empty folder that nobody else can read; Ray's logs are in it after the block.

    Raises:
        ClusterUnavailable: It could not be started. Nothing of it runs any more.
    """
    children = psutil.Process().children()
    with _own_token(scratch):
        try:
            _start(config, scratch, children)
            yield
        finally:
            _end(children)


@contextlib.contextmanager
def _own_token(scratch: Path) -> Iterator[None]:
    """Has Ray ask for a token of this cluster's own.

    Ray's own default is ~/.ray/auth_token, which other users may be able to read, and whose mere
    existence makes every later `ray start` ask for it.
    """
    before = {name: os.environ.get(name) for name in _AUTHENTICATION}
    file = scratch / "auth_token"
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
        opened.write(secrets.token_hex(32))
    os.environ.pop("RAY_AUTH_TOKEN", None)  # it would come first
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(file)
    _read_authentication_again()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        file.unlink(missing_ok=True)
        _read_authentication_again()


def _read_authentication_again() -> None:
    """Have this process forget which token it used, and whether it used one."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _start(config: ClusterConfig, scratch: Path, children: list[psutil.Process]) -> None:
    try:
        try:
            _init(config, scratch)
        except Exception as error:
            if not _took_too_long(error):
                raise
            _log.warning(
                "Ray did not start within its 30 s: this machine or the disk of %s is busy. Once "
                "more, with %.0f s (cluster.start_timeout_s).",
                *(scratch, config.start_timeout_s),
            )
            _end(children)
            shutil.rmtree(scratch / "ray", ignore_errors=True)
            with _extend_start_limit(config.start_timeout_s):
                _init(config, scratch)
    except Exception as error:
        if not isinstance(error, _START_ERRORS) and not _took_too_long(error):
            raise
        said = " ".join(str(error).split())
        raise ClusterUnavailable(
            f"No private Ray cluster could be started in {scratch}: {said} Check the free memory, "
            "disk and length of that path (cluster.scratch_dir) and the load of this machine, give "
            f"it more time (cluster.start_timeout_s={config.start_timeout_s:g}), or use "
            f"cluster.backend=local, which needs no Ray.{_last_words(scratch)}"
        ) from error


def _took_too_long(error: Exception) -> bool:
    """Ray raises a bare Exception when its node does not come up in time."""
    return type(error) is Exception or isinstance(error, TimeoutError)


def _init(config: ClusterConfig, scratch: Path) -> None:
    few = partial(parameter.RayParams, no_monitor=True, include_log_monitor=False)
    with (
        # On Linux Ray replaces 127.0.0.1 by the address the host is reached by, unless it believes
        # that it cannot form clusters here, as on macOS.
        replaced(ray_constants, "ENABLE_RAY_CLUSTER", False),
        # Each is a process that imports Ray and of which nothing is used: what adds nodes, what
        # shows workers' output to the driver, and the server that without a dashboard counts users.
        # For the last one `ray.init` would wait.
        replaced(parameter, "RayParams", few),
        replaced(node.Node, "start_api_server", lambda *_, **__: None),
        replaced(
            services, "start_ray_process", partial(_start_process, services.start_ray_process)
        ),
    ):
        ray.init(
            address="local",
            num_cpus=max(
                config.workers * config.cpus_per_worker + config.beside_cpus, os.cpu_count() or 1
            ),
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
            # Ray opens its directory to everybody; the one around it is ours alone.
            _temp_dir=str(scratch / "ray"),
            # The workers get an environment of their own, so processes started ahead are of no use.
            _system_config={"prestart_worker_first_driver": False},
        )


def _start_process(start: Callable[..., Any], command: list[str], *kind: str, **more: Any) -> Any:
    """Starts one of Ray's daemons; the raylet with an agent that offers nothing."""
    return start([_without_agent(word) for word in command], *kind, **more)


def _without_agent(word: str) -> str:
    name, _, agent = word.partition("=")
    if name != "--dashboard_agent_command":
        return word
    told = dict(each.split("=", 1) for each in shlex.split(agent) if "=" in each)
    # Neither site-packages nor what the environment says are of use to it.
    own = [sys.executable, "-ISE", str(_AGENT), told["--session-dir"], told["--node-id"]]
    return f"{name}={subprocess.list2cmdline(own)}"


@contextlib.contextmanager
def _extend_start_limit(seconds: float) -> Iterator[None]:
    """Has Ray wait longer for its node: its own limit of 30 s cannot be set."""
    look = services.get_node
    deadline = time.monotonic() + seconds

    def wait(*arguments: Any) -> Any:
        while True:
            try:
                return look(*arguments)
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    with replaced(services, "get_node", wait):
        yield


def _end(children: list[psutil.Process]) -> None:
    """Ends the daemons and all their workers, also those that Ray itself has forgotten.

    Ray leaves the daemons of a start that failed running. Left alone, the workers of a cluster
    notice only seconds later that it is gone.
    """
    daemons = [child for child in psutil.Process().children() if child not in children]
    family = daemons + [worker for daemon in daemons for worker in _descendants(daemon)]
    ray.shutdown()
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family, timeout=5)


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _last_words(scratch: Path) -> str:
    """The ends of the logs of a cluster that did not start; the folder does not stay."""
    logs = scratch / "ray" / "session_latest" / "logs"
    words = ""
    for name in ("gcs_server.out", "gcs_server.err", "raylet.out", "raylet.err"):
        with contextlib.suppress(OSError):
            lines = (logs / name).read_text(errors="replace").splitlines()[-_LOG_LINES:]
            words += "".join(f"\n{name}: {line}" for line in lines)
    return words
