"""What runs beside the workers: a Ray task on resources of its own, which no worker waits for.

A worker asks for it, so it ends with that worker. It gets a process of its own, which ends with it
and gives its GPU's memory back; spare workers are left for workers.
"""

import gc
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Any

import ray

from cluster.contract import BesideFailed, BesideTask, ClusterConfig, Payload

_LOST_RETRIES = 1
"""How often it is begun again where its node or its process was lost."""


class RayBeside:
    """Begins tasks; it travels to the workers.

    Args:
        config: What a task gets.
        gpus_per_worker: GPUs of a worker, which `auto` follows.
    """

    def __init__(self, config: ClusterConfig, *, gpus_per_worker: int) -> None:
        self._cpus = config.beside_cpus
        self._gpus = min(1, gpus_per_worker)
        if config.beside_gpus != "auto":
            self._gpus = config.beside_gpus

    def __call__(self, function: Callable[[Payload], Payload], payload: Payload) -> BesideTask:
        """Begins a task as soon as there is room for it; see `cluster.contract.Beside`."""
        task = ray.remote(max_calls=1)(_run).options(
            num_cpus=self._cpus,
            num_gpus=self._gpus,
            num_returns="streaming",
            max_retries=_LOST_RETRIES,
            # Not where Ray Train's workers are, whose resources are all taken.
            scheduling_strategy="DEFAULT",
            # Another environment than that of spare workers, or it would take one of them.
            runtime_env={"env_vars": _environment(self._cpus, self._gpus)},
        )
        try:
            return RayBesideTask(task.remote(function, payload))
        except ray.exceptions.RayError as error:
            raise BesideFailed(f"it could not be begun ({type(error).__name__})") from error


def _environment(cpus: int, gpus: int) -> dict[str, str]:
    found = {"OMP_NUM_THREADS": str(cpus), "LAPFLOW_PROCESS": "beside"}
    if gpus == 0:
        # Ray shows a task without GPUs all of its node's, and these are workers'.
        found["CUDA_VISIBLE_DEVICES"] = ""
    return found


class RayBesideTask:
    """A task, as who began it sees it.

    Args:
        values: Gives a first value when it begins, and what it returns when it ends.
    """

    def __init__(self, values: Any) -> None:
        self._values = values
        self._begun: Any = None
        self._ended: Any = None

    def has_begun(self) -> bool:
        """Whether it had room to begin."""
        if self._begun is None and self._is_there(timeout_s=0.0):
            self._begun = next(self._values)
        return self._begun is not None

    def join(self, timeout_s: float) -> bool:
        """Waits for its end, but no longer than so; whether it has ended."""
        if self._begun is None:
            if not self._is_there(timeout_s=timeout_s):
                return False
            self._begun = next(self._values)
            timeout_s = 0.0
        if self._ended is None and self._is_there(timeout_s=timeout_s):
            # Where it fails before it begins, that is its only value.
            self._ended = next(self._values, self._begun)
        return self._ended is not None

    def result(self) -> Payload:
        """What it returned; see `cluster.contract.BesideTask`."""
        try:
            returned: Payload = ray.get(self._ended)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if error.cause is not None else error
            raise BesideFailed(f"{type(cause).__name__}: {cause}") from error
        except ray.exceptions.RayError as error:
            raise BesideFailed(f"its process was lost ({type(error).__name__})") from error
        return returned

    def cancel(self) -> None:
        """Ends it, wherever it is."""
        with suppress(ray.exceptions.RayError, ValueError):
            ray.cancel(self._values, force=True)

    def _is_there(self, *, timeout_s: float) -> bool:
        ready, _ = ray.wait([self._values], timeout=timeout_s)
        return bool(ready)


def _run(function: Callable[[Payload], Payload], payload: Payload) -> Generator[Payload]:
    gc.enable()  # which what is loaded ahead on workers' nodes turns off
    yield {}
    yield function(payload)
