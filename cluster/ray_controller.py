"""Ray Train's controller with policies of our own: it looks for room, and asks the driver.

Ray's own policy counts every failure of a long run, and charges starts that timed out. Ours decides
nothing: whether to go on after a failure is the driver's to say (`cluster.recovery`). Workers are
started when nodes that answer have room for them (`cluster.ray_room`).

The controller runs in a thread of the driver.
"""

import asyncio
import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import ray
from ray import ActorID, cloudpickle
from ray._private.state import actors
from ray.exceptions import RayActorError, RayTaskError
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
)
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup, state, worker_group
from ray.train.v2._internal.logging.logging import SessionFileHandler
from ray.train.v2.api.callback import RayTrainCallback
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from cluster.assignment import WorkerGroupSpec
from cluster.failure import Failure, describe_exit
from cluster.process_group import WorkersAbsent
from cluster.ray_mailbox import Broken, Mailbox, Seat
from cluster.ray_output import output_paths
from cluster.ray_room import RoomPolicy, one_line
from cluster.ray_worker import NotJoined, note_attempt
from cluster.tested import replaced

_SIGTERM = "receives a SIGTERM"
"""What Ray says of a worker that one has ended."""
_FAILED_STARTS = (WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError)

_log = logging.getLogger(__name__)


class Trainer(DataParallelTrainer):  # type: ignore[misc]
    """Ray Train with our policies.

    Args:
        sizes: The workers; of each number of them that will do.
        patience_s: How long a start waits for more of them.
        may_grow: Whether nodes can be asked for.
        mailbox: The line to the driver.
        abandoned: Set once the run is given up, whatever it waits for.
        callbacks: Called before and after each start of the workers. Those of Ray's configuration
            would be sent to all of them.
        arguments: Those of Ray's class.
    """

    def __init__(
        self,
        *arguments: Any,
        sizes: Sequence[WorkerGroupSpec],
        patience_s: float,
        may_grow: bool,
        mailbox: Mailbox,
        abandoned: threading.Event,
        callbacks: Sequence[WorkerGroupCallback],
        **more: Any,
    ) -> None:
        super().__init__(*arguments, **more)
        self._callbacks = callbacks
        self._may_grow = may_grow
        self._sizes = sizes
        self._patience_s = patience_s
        self._mailbox = mailbox
        self._abandoned = abandoned
        self._controller: Controller | None = None

    def fit(self) -> None:
        """Runs the controller to its end, in this thread.

        Ray Train would run it in a process of its own, which has to import all that this one has,
        and takes part of a core from workers that keep all cores busy. So does the actor of its
        collectives, which nothing here calls.

        Raises:
            ray.train.TrainingFailedError: The run ended with it.
            Abandoned: It was given up, unless Ray Train has made an error of its own of that.
        """
        with (
            _logging_to_file(),
            replaced(worker_group, "SynchronizationActor", _NoActor),
            replaced(state, "_shutdown_sync_actor", _NoActor.shutdown),
        ):
            self._controller = controller = Controller(
                abandoned=self._abandoned,
                train_fn_ref=Packed(cloudpickle.dumps(self._get_train_func())),
                scaling_policy=RoomPolicy(
                    self.scaling_config,
                    self._sizes,
                    self._mailbox,
                    patience_s=self._patience_s,
                    may_grow=self._may_grow,
                ),
                failure_policy=AskingPolicy(self._mailbox, self._abandoned),
                train_run_context=self.train_run_context,
                callbacks=[
                    *self._create_default_callbacks(),
                    *self._callbacks,
                    AttemptOpener(self._mailbox),
                ],
            )
            asyncio.run(controller.run())
        result = controller.get_result()
        if result.error is not None:
            raise result.error

    def abandon(self) -> None:
        """Ends the workers, and with them the wait of `fit`."""
        self._abandoned.set()
        if self._controller is not None:
            self._controller.release_room()

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        # Those of Ray's data sets, and what tidies up behind a controller whose driver lives on,
        # have no work here, and each starts a process, one of them at every start of the workers.
        idle = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [each for each in super()._create_default_callbacks() if not isinstance(each, idle)]


@dataclass(frozen=True)
class Packed:
    """The workers' function, in the place of Ray's reference to an object of its store.

    A worker that fetches the object may be sent to the copy on a node that is gone, and waits ten
    seconds before it asks elsewhere. The controller passes this on unopened, and imports nothing.

    Attributes:
        data: The pickled function.
    """

    data: bytes

    def get(self) -> Callable[[], None]:
        """Opens it, in a worker."""
        function: Callable[[], None] = cloudpickle.loads(self.data)
        return function


class Abandoned(Exception):
    """The run was given up while the workers were awaited."""


class _NoActor:
    """In the place of the actor behind Ray Train's collectives: the word for "there is none"."""

    @classmethod
    def options(cls, **_: Any) -> type["_NoActor"]:
        return cls

    @staticmethod
    def remote(**_: Any) -> str:
        return ""

    @staticmethod
    def shutdown(_: str) -> None:
        """Has nothing to end."""


class Group(WorkerGroup):  # type: ignore[misc]
    """Ray's workers; those of which one is lost before all have met give their room back.

    Attributes:
        groups: Those of a controller, to which Ray gives a group only once it has started.
        room: Their placement group, once it is asked for.
    """

    groups: ClassVar[list["Group"]] = []

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.room: Any = None
        self.groups[:] = [self]

    def _start(self) -> None:
        try:
            super()._start()
        except BaseException:
            # Ray Train forgets them, and their placement group stays.
            if self.has_started():
                self.shutdown()
            raise

    def _create_placement_group(self, *arguments: Any) -> Any:
        self.room = super()._create_placement_group(*arguments)
        return self.room

    def _create_workers(self, *arguments: Any, **more: Any) -> Any:
        with self._bounding():
            return super()._create_workers(*arguments, **more)

    def _init_train_context(self, *arguments: Any) -> None:
        with self._bounding():
            super()._init_train_context(*arguments)

    def end(self) -> None:
        """Ends the workers there are, or that are being started, whatever is awaited of them."""
        if self.room is not None:
            self.room.shutdown()
        # Of those that have no process yet, Ray would wait for it.
        connection = ray._private.worker.global_worker
        for actor in actors(job_id=connection.current_job_id).values():
            if actor["ActorClassName"] == self._worker_cls.__name__ and actor["State"] != "DEAD":
                connection.core_worker.kill_actor(ActorID.from_hex(actor["ActorID"]), True)

    @contextlib.contextmanager
    def _bounding(self) -> Iterator[None]:
        """Ends all processes where one of them does not answer, for which Ray Train would wait."""
        limit_s = self._worker_group_start_timeout_s
        ending = threading.Lock()
        is_over, is_done = threading.Event(), threading.Event()

        def give_up() -> None:
            with ending:
                if is_done.is_set():  # they came while the time ran out
                    return
                is_over.set()
            try:
                self.end()
            except Exception as error:  # then Ray itself is away, which the wait finds out
                _log.warning("Workers that do not come up cannot be ended: %s", error)

        timer = threading.Timer(limit_s, give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
            with ending:
                is_done.set()
        except (ray.exceptions.RayError, *_FAILED_STARTS) as error:
            if not is_over.is_set():
                raise
            told = f"not all workers' processes came up within {limit_s:g} s"
            raise WorkersAbsent((), f"{told} (cluster.start_timeout_s)") from error
        finally:
            timer.cancel()

    def _init_train_context_on_workers(
        self, workers: list[Any], sync_actor: str, train_context_args: dict[str, list[Any]]
    ) -> None:
        # Ray's own names the actor that the controller runs in.
        ray.get(
            [
                worker.actor.init_train_context.remote(
                    train_run_context=self._train_run_context,
                    distributed_context=worker.distributed_context,
                    synchronization_actor=sync_actor,
                    storage_context=self._storage_context,
                    worker_callbacks=self._worker_callbacks_to_propagate,
                    controller_actor=None,
                    **{name: values[place] for name, values in train_context_args.items()},
                )
                for place, worker in enumerate(workers)
            ]
        )


class Controller(TrainController):  # type: ignore[misc]
    """Ray's controller; it ends what is left of failed workers before it looks for room.

    Args:
        abandoned: Set once the run is given up.
        arguments: Those of Ray's class.
    """

    def __init__(self, *, abandoned: threading.Event, **arguments: Any) -> None:
        self._abandoned = abandoned
        self._groups: list[Group] = []
        self.worker_group_cls = type("Group", (Group,), {"groups": self._groups})
        super().__init__(**arguments)

    def release_room(self) -> None:
        """Ends the workers there are, or that are being started, whatever is awaited of them."""
        for group in self._groups:
            group.end()

    async def _run_control_loop_iteration(self) -> None:
        require_wanted(self._abandoned)
        await super()._run_control_loop_iteration()

    def _make_and_handle_scaling_decision_for_non_running_worker_group(
        self, controller_state: Any
    ) -> Any:
        if self._worker_group is not None and self._worker_group.has_started():
            self._shutdown_worker_group()
        return super()._make_and_handle_scaling_decision_for_non_running_worker_group(
            controller_state
        )


def require_wanted(abandoned: threading.Event) -> None:
    """Ends Ray Train's thread if the run was given up.

    Raises:
        Abandoned: It was.
    """
    if abandoned.is_set():
        raise Abandoned


@contextlib.contextmanager
def _logging_to_file() -> Iterator[None]:
    """Has Ray Train's lines among Ray's logs, and not between the driver's own."""
    handler = SessionFileHandler(f"ray-train-controller-{os.getpid()}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("ray.train")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        with replaced(logger, "propagate", False):
            yield
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)
        handler.close()


class AskingPolicy(FailurePolicy):  # type: ignore[misc]
    """Has the driver decide what follows a failure.

    Args:
        mailbox: The line to it.
        abandoned: Set once the run is given up.
    """

    def __init__(self, mailbox: Mailbox, abandoned: threading.Event) -> None:
        super().__init__(FailureConfig())
        self._mailbox = mailbox
        self._abandoned = abandoned

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Returns, once the driver wants so, that the workers are to be started again.

        Raises:
            Abandoned: The run was given up meanwhile.
        """
        require_wanted(self._abandoned)
        self._mailbox.ask(
            describe_failure(training_failed_error),
            meanwhile=partial(require_wanted, self._abandoned),
        )
        return FailureDecision.RETRY


def describe_failure(error: TrainingFailedError) -> Broken:
    """What Ray Train tells of a failure, in terms that travel."""
    if isinstance(error, WorkerGroupError):
        failures = tuple(_failure(rank, one) for rank, one in error.worker_failures.items())
        return Broken("workers", failures, one_line(error))
    cause = error.controller_failure if isinstance(error, ControllerError) else error
    if isinstance(cause, _FAILED_STARTS):
        return Broken("start", (), one_line(cause))
    # Workers that were lost, or that failed to meet, while Ray Train prepared them.
    origin = getattr(cause, "cause", None)
    for late in (cause, origin):
        if isinstance(late, WorkersAbsent):
            return Broken("start", (), late.text, absent=late.ranks)
    if isinstance(origin, NotJoined):
        failure = Failure(rank=origin.rank, attempt=-1, kind="raised", text=origin.text)
        return Broken("workers", (failure,), origin.text)
    of_workers = isinstance(cause, RayActorError) or (
        isinstance(cause, RayTaskError) and not isinstance(origin, ImportError)
    )
    text = f"{type(origin).__name__}: {one_line(origin)}" if origin is not None else one_line(cause)
    return Broken("workers" if of_workers else "else", (), text)


def _failure(rank: int, error: BaseException) -> Failure:
    """The failure of a worker that may not have been able to tell it itself."""
    cause = getattr(error, "health_check_failure", error)
    if isinstance(cause, RayActorError):
        if _SIGTERM in str(cause):
            text = describe_exit(128 + signal.SIGTERM)
            return Failure(rank=rank, attempt=-1, kind="died", text=f"{text}.")
        # Ray does not know the exit code of a process that ended itself.
        text = (
            "was lost with its process or its node (it ended by itself, which its last words tell, "
            "or was killed, by hand or because memory ran out)"
        )
        return Failure(rank=rank, attempt=-1, kind="died", text=f"{text}: {one_line(cause)}")
    return Failure(
        rank=rank, attempt=-1, kind="raised", text=f"{type(cause).__name__}: {one_line(cause)}"
    )


class AttemptOpener(WorkerGroupCallback):  # type: ignore[misc]
    """Tells the driver who runs where, before the workers meet.

    Args:
        mailbox: The line to it.
    """

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox

    def before_init_train_context(self, workers: list[Any]) -> dict[str, list[Any]]:
        """Opens an attempt with its seats, in the order of ranks."""
        files = ray.get([worker.execute_async(output_paths) for worker in workers])
        attempt = self._mailbox.begin(
            [
                Seat(
                    node=worker.metadata.node_id,
                    address=worker.metadata.node_ip,
                    host=worker.metadata.hostname,
                    pid=worker.metadata.pid,
                    output=paths,
                )
                for worker, paths in zip(workers, files, strict=True)
            ]
        )
        ray.get([worker.execute_async(note_attempt, attempt) for worker in workers])
        return {}
