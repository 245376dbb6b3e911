"""Where the figures at a run's end go: into the store, to the tracker, and never nowhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.store import Store
from trainer.evaluate.report import EvaluationReport, evaluation_key
from trainer.metrics.tracker import Tracker


@dataclass(frozen=True, kw_only=True)
class Publisher:
    """Takes what was measured of one checkpoint.

    Attributes:
        store: Where results go.
        run: Name of the run.
        images: Images the weights were trained on.
        attempt: Finds the random name of their checkpoint.
        tracker: Takes the figures and the grid.
        tell: Takes a message for the driver.
    """

    store: Store
    run: str
    images: int
    attempt: Callable[[], str]
    tracker: Tracker
    tell: Callable[[dict[str, object]], None]

    def publish(self, report: EvaluationReport, *, samples: bytes, grid: bytes) -> None:
        """Write results, and hand them to the driver where the store does not take them.

        Args:
            report: The figures; which checkpoint they are of is filled in.
            samples: The samples as an archive.
            grid: Some of them as a picture.
        """
        try:
            whole = replace(report, origin=replace(report.origin, attempt=self.attempt()))
            # The report comes last: where it is, the evaluation is complete.
            results = {"samples.npz": samples, "grid.png": grid, "report.json": whole.to_json()}
            for name, data in results.items():
                self.store.put(evaluation_key(self.run, self.images, name), data)
        except CheckpointError as error:
            figures = report.to_json().decode()
            self.tell({"kind": "unwritten", "text": str(error), "report": figures})
        self.tracker.metrics(report.metrics(), images=self.images)
        self.tracker.image("evaluation", grid, images=self.images)
