"""Curves of what is measured of a run's checkpoints in MLflow: none has figures of two protocols.

MLflow compares what has one name. So the names `eval/…` and `reference/…` belong to the protocol by
which a run was measured first, `eval_during/…` to that of its first checkpoint on the way. Whatever
is measured otherwise later has the first characters of its protocol in the name, `eval_3f0c5a/…`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from trainer.metrics.mlflow_models import RunModels
from trainer.metrics.tracker import UNKNOWN, Figure

_PROTOCOL_TAG = "mlflow.lapflow.protocol."  # the pages show no tag that begins so
_SHOWN_CHARACTERS = 6


class FigureCurves:
    """Which curves of one run figures belong to.

    Args:
        client: Speaks to MLflow.
        run_id: MLflow's ID of the run.
        models: The run's models.
    """

    def __init__(self, client: Any, run_id: str, models: RunModels) -> None:
        self._client = client
        self._run_id = run_id
        self._models = models
        self._protocols: dict[str, str] = {}

    def curve(self, name: str, there: Collection[str]) -> str:
        """Return the name of the curve of a metric, which is its own unless it has a protocol.

        Args:
            name: The metric's, of a figure with its protocol, see `Figure`.
            there: Names of the curves that the run has.
        """
        figure = Figure.parse(name)
        if figure is None:
            return name
        if self._protocol(figure, there) == figure.protocol:
            return f"{figure.group}/{figure.rest}"
        return f"{figure.group}_{figure.protocol[:_SHOWN_CHARACTERS]}/{figure.rest}"

    def _protocol(self, figure: Figure, there: Collection[str]) -> str:
        """Return the protocol to which the names of a group belong: this one's if it is new."""
        # What real images reach in the place of the samples was measured as those were.
        _, _, way = figure.group.partition("_")
        group = f"eval_{way}" if way else "eval"
        if group not in self._protocols:
            tag = f"{_PROTOCOL_TAG}{group}"
            known = self._client.get_run(self._run_id).data.tags.get(tag)
            if known is None:
                known = figure.protocol
                if any(each.startswith(f"{group}/") for each in there):
                    # A version that did not record it has begun them.
                    known = self._models.first_protocol(group) or UNKNOWN
                self._client.set_tag(self._run_id, tag, known)
            self._protocols[group] = known
        return self._protocols[group]


def with_figures(text: str, images: int, figures: Mapping[str, float], *, lowest: str) -> str:
    """Return the description of a run with a table of figures.

    Args:
        text: What is told of the run.
        images: The position of the run that was measured.
        figures: What was, by the names of the curves.
        lowest: That of the figures which comes first; it may be missing.
    """
    rows = "\n".join(f"| `{name}` | {value:.5g} |" for name, value in figures.items())
    head = ""
    if lowest in figures:
        head = f"After {images:,} images **{lowest} = {figures[lowest]:.4g}**\n\n"
    return f"{head}{text}\nAfter {images:,} images:\n\n| figure | value |\n| --- | --- |\n{rows}\n"
