"""Spare worker processes: started ahead, with everything imported, for the next start of workers.

Most of a restart is the start of processes and their imports, which are the same for each. So once
an attempt has trained for a while, each node gets as many spares as workers it has room for. A
spare is a process that Ray has started and given no work yet; Ray takes one of them for a worker
before it starts another, and ends those that are left with the job. It is new: no attempt has run
in it. All of them, and workers that do not come from spares, run the same hook at their start.

All but `spare_environment` runs in Ray Train's controller.
"""

import gc
import importlib
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import ray
from ray._private.grpc_utils import init_grpc_channel
from ray._private.runtime_env.setup_hook import export_setup_func_callable
from ray.core.generated.common_pb2 import PYTHON, WORKER
from ray.core.generated.node_manager_pb2 import GetNodeStatsRequest, PrestartWorkersRequest
from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub
from ray.train.v2._internal.execution.callback import WorkerGroupCallback

from cluster.assignment import Node, WorkerGroupSpec
from cluster.ray_leaving import with_own
from cluster.ray_nodes import free_nodes, node_doors

AFTER_S = 30.0
"""How long workers have run before spares are started, which takes seconds of their cores."""
_ANSWER_S = 10.0
_KEPT_S = 10 * 365 * 86_400
"""How long Ray leaves a spare alone; it ends with the job."""
_MAX_AT_ONCE = 32
_NO_ACTOR = frozenset({b"", b"\xff" * 16})


def spare_environment(warm_up: Callable[[], None], *, gpu: bool, threads: int) -> dict[str, Any]:
    """The runtime environment of workers whose processes load things before they get their work.

    Args:
        warm_up: An importable function that imports what a worker needs.
        gpu: Whether each worker has a GPU.
        threads: Compute threads of a worker.
    """
    # What `cluster.process_group.join` sets before torch and DeepSpeed are imported there.
    variables = {"OMP_NUM_THREADS": str(threads)} | ({} if gpu else {"DS_ACCELERATOR": "cpu"})
    worker = ray._private.worker.global_worker
    environment: dict[str, Any] = export_setup_func_callable(
        {"env_vars": variables},
        _hook(
            list(worker.core_worker.get_job_config().py_driver_sys_path),
            warm_up.__module__,
            warm_up.__qualname__,
        ),
        worker,
    )
    # A word for people, which Ray allows for whole jobs alone.
    environment.pop("worker_process_setup_hook")
    return environment


def _hook(paths: Sequence[str], module: str, function: str) -> Callable[[], None]:
    # A closure, which travels by value. Ray adds the driver's folders to the path of a process only
    # when that gets work.
    def load() -> None:
        sys.path[:0] = [path for path in dict.fromkeys(paths) if path not in sys.path]
        from cluster.ray_spares import call

        call(module, function)

    return load


def call(module: str, function: str) -> None:
    """Calls a function by its name; what it raises is only told, for the worker will meet it too.

    Args:
        module: Where it is.
        function: Its name there.
    """
    gc.disable()  # imports make no garbage; `cluster.ray_worker.work` turns it on again
    try:
        getattr(importlib.import_module(module), function)()
    except Exception:
        traceback.print_exc()


class SpareKeeper(WorkerGroupCallback):  # type: ignore[misc]
    """Has every node keep spares, from a while after each start of the workers on.

    Args:
        spec: The most workers there may be.
        report: Takes a line for a person.
    """

    def __init__(self, spec: WorkerGroupSpec, report: Callable[[str], None]) -> None:
        self._spec = spec
        self._report = report
        self._after_s = AFTER_S
        self._asked: Counter[str] = Counter()
        self._due_s = float("inf")
        self._environment = ""
        self._own: tuple[str, ...] = ()

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Notes where the workers run, and what a spare for them is like."""
        workers = worker_group.get_workers()
        self._own = tuple(worker.metadata.node_id for worker in workers)
        self._asked -= Counter(self._own)
        self._environment = ray.get(workers[0].execute_async(_environment))
        self._due_s = time.monotonic() + self._after_s

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Has the spares started once it is time, in a thread, since nodes may not answer."""
        if time.monotonic() >= self._due_s:
            self._due_s = float("inf")
            threading.Thread(target=self._fill, name="spares", daemon=True).start()

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        """Starts no spares between two attempts."""
        self._due_s = float("inf")

    def _fill(self) -> None:
        try:
            wanted = spares_of(with_own(free_nodes(), self._own, self._spec), self._spec)
            doors = node_doors()
            job = bytes.fromhex(ray.get_runtime_context().get_job_id())
        except (ray.exceptions.RayError, RuntimeError) as error:
            self._report_lack("", error)
            return
        ask = partial(fill, job=job, environment=self._environment)
        # Also of a node that fails: it may have started them, and `fill` looks at what is there.
        asked, self._asked = self._asked, self._asked | wanted
        with ThreadPoolExecutor(_MAX_AT_ONCE) as pool:
            fills = {
                doors[node]: pool.submit(ask, doors[node], count, asked[node])
                for node, count in wanted.items()
                if node in doors
            }
        failed = [(door, why) for door, done in fills.items() if (why := done.exception())]
        if failed:
            door, why = failed[0]
            self._report_lack(f" ({len(failed)} of {len(fills)} nodes, first {door})", why)

    def _report_lack(self, where: str, error: BaseException) -> None:
        said = " ".join(str(error).split())[:300]
        self._report(f"some spare workers are lacking{where}, a restart may take longer: {said}")


def spares_of(nodes: Sequence[Node], spec: WorkerGroupSpec) -> Counter[str]:
    """How many spares each node is to have: as many as workers may come to run there.

    Args:
        nodes: What each node would have free, had the workers left.
        spec: The workers.
    """
    room = {node.id: spec.groups_that_fit(node) * spec.group_size for node in nodes}
    return Counter({node: min(count, spec.workers) for node, count in room.items() if count})


def fill(address: str, count: int, asked: int, *, job: bytes, environment: str) -> None:
    """Has a node start as many spares as it lacks.

    Args:
        address: Host and port of its raylet.
        count: How many it is to have.
        asked: How many it was asked for that no worker has taken; some may have died.
        job: Ray's number of this job.
        environment: Ray's text of the workers' runtime environment.

    Raises:
        grpc.RpcError: The node does not answer, or refuses.
    """
    with init_grpc_channel(address) as channel:
        node = NodeManagerServiceStub(channel)
        told = node.GetNodeStats(GetNodeStatsRequest(), timeout=_ANSWER_S)
        # Among them may be idle processes of another environment: those are not ours.
        idle = sum(
            one.job_id == job and one.worker_type == WORKER and one.actor_id in _NO_ACTOR
            for one in told.core_workers_stats
        )
        if (lacking := count - min(idle, asked)) <= 0:
            return
        request = PrestartWorkersRequest(
            language=PYTHON,
            job_id=job,
            keep_alive_duration_secs=_KEPT_S,
            num_workers=lacking,
        )
        request.runtime_env_info.serialized_runtime_env = environment
        node.PrestartWorkers(request, timeout=_ANSWER_S)


def _environment() -> str:
    return str(ray.get_runtime_context().get_runtime_env_string())
