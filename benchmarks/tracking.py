"""Training steps with a tracker beside them, against the same steps without."""

import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import command
from benchmarks.interleaved import interleave, stopwatch_of
from benchmarks.workload import Latents, TrainingWork
from trainer.metrics.journal import JournalPlace
from trainer.metrics.mlflow_backend import check_tracker
from trainer.metrics.mlflow_tracker import MlflowTracker, TrackedRun
from trainer.metrics.tracker import Tracker, TrackingConfig
from trainer.storage.local import LocalStore

_DESCRIPTION = """\
The same updates alone, and with a tracker that takes a point of the curves every so many of them:
the point is written down, and sent while training goes on. `slower` is by how much of a step, as
the clock shows it. `sending_ms` is the processor time that the tracker's thread takes for a point,
those after a round too, and `of_a_core` its share of one core from one point to the next: what it
costs where ranks use all cores.

  python -m benchmarks.tracking
  python -m benchmarks.tracking --uri http://HOST:5000 --metrics 200"""


class _TrackedSteps:
    """Some updates, with points on the way.

    Args:
        work: One update.
        updates: How many.
        every: Updates from one point to the next.
        metrics: Values of a point.
        tracker: Takes them.
    """

    def __init__(
        self,
        work: Callable[[], object],
        *,
        updates: int,
        every: int,
        metrics: int,
        tracker: Tracker,
    ) -> None:
        self._work = work
        self._updates = updates
        self._every = every
        self._names = [f"loss/metric_{number}" for number in range(metrics)]
        self._tracker = tracker
        self._images = 0
        self.told_s: list[float] = []

    def __call__(self) -> None:
        for number in range(self._updates):
            self._work()
            self._images += 1
            if (number + 1) % self._every == 0:
                values = dict.fromkeys(self._names, 1.0 / self._images)
                began = time.perf_counter()
                self._tracker.metrics(values, images=self._images)
                self.told_s.append(time.perf_counter() - began)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = command.parser("tracking", description=_DESCRIPTION, rounds=5)
    command.add_size(parser, size="B/2", depth=2, batch=8)
    parser.add_argument("--updates", type=command.positive, default=100, help="default 100")
    parser.add_argument("--every", type=command.positive, default=10, help="default 10")
    parser.add_argument("--metrics", type=command.positive, default=50, help="default 50")
    parser.add_argument("--uri", help="MLflow tracking URI; default a SQLite file")
    options = parser.parse_args(arguments)
    setting = command.setting("tracking", options)
    work = TrainingWork(
        command.sizes(options),
        scales=2,
        latents=Latents(batch=options.batch, channels=options.channels, size=options.image_size),
        device=setting.device,
    )
    with tempfile.TemporaryDirectory(prefix="lapflow-") as folder:
        config = TrackingConfig(uri=options.uri, experiment="benchmark", flush_timeout_s=60)
        others = set(threading.enumerate())
        tracker = _open(config, Path(folder))
        (sender,) = (each for each in threading.enumerate() if each not in others)
        clock = stopwatch_of(setting.device)
        chosen = {"updates": options.updates, "every": options.every, "metrics": options.metrics}
        steps = {
            name: _TrackedSteps(work, tracker=each, **chosen)
            for name, each in (("alone", Tracker()), ("tracked", tracker))
        }

        def stopwatch(candidate: Callable[[], object]) -> float:
            taken_s = clock(candidate)
            while tracker.unsent():  # what is still sent would disturb the next candidate
                time.sleep(0.1)
            return taken_s

        before_s = _processor_s(sender)
        timings = interleave(steps, rounds=options.rounds, stopwatch=stopwatch)
        sending_s = (_processor_s(sender) - before_s) / max(1, len(steps["tracked"].told_s))
        tracker.close("FINISHED")
    for timing in timings:
        update_s = timing.minimum / options.updates
        sending = {
            "sending_ms": 1000 * sending_s,
            "of_a_core": sending_s / (update_s * options.every),
        }
        setting.report.add(
            steps=timing.name,
            update_s=update_s,
            spread=timing.spread,
            told_ms=1000 * min(steps[timing.name].told_s, default=0.0),
            slower=timing.ratio - 1,
            **(sending if timing.name == "tracked" else {}),
        )
    setting.deliver()
    return 0


def _processor_s(thread: threading.Thread) -> float:
    """Return the processor time that a thread has taken so far."""
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident or 0))


def _open(config: TrackingConfig, home: Path) -> MlflowTracker:
    check_tracker(config, str(home))
    store = LocalStore(home / "store")
    run = TrackedRun(
        name="benchmark",
        place=str(home),
        identity=home.name,
        journal=JournalPlace.of(home, store, run="benchmark", identity=home.name),
        home=str(home),
    )
    return MlflowTracker(config, run, writer="000000000001-00000")


if __name__ == "__main__":
    sys.exit(command.run_guarded(main))
