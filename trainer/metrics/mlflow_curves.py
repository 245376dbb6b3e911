"""The curves of a run, as MLflow recorded them."""

from __future__ import annotations

from pathlib import Path

from pipelines.proxies import proxy_hint
from trainer.metrics.mlflow_place import TrackerUnreachable, cause, connect


def run_curves(uri: str, *, experiment: str, run: str) -> dict[str, dict[int, float]]:
    """Read all metrics of the newest run of a name.

    Args:
        uri: Tracking URI.
        experiment: Experiment that holds the run.
        run: Name of the run.

    Returns:
        For each metric its values by images seen.

    Raises:
        TrackerUnreachable: The tracker cannot be read, or holds no such run.
    """
    from mlflow.entities import ViewType

    local = uri.removeprefix("sqlite:///")
    if local != uri and not Path(local).exists():
        raise TrackerUnreachable(f"run {run} cannot be read: there is no tracker file {local}")
    try:
        client = connect(uri)
        known = client.get_experiment_by_name(experiment)
        runs = []
        if known is not None:
            name = run.replace("'", "\\'")
            runs = client.search_runs(
                [known.experiment_id],
                f"attributes.run_name = '{name}'",
                run_view_type=ViewType.ACTIVE_ONLY,
                max_results=1,
                order_by=["attributes.start_time DESC"],
            )
        if runs:
            return {
                metric: {
                    point.step: point.value
                    for point in client.get_metric_history(runs[0].info.run_id, metric)
                }
                for metric in runs[0].data.metrics
            }
    except Exception as error:
        raise TrackerUnreachable(
            f"MLflow at {uri} cannot be read: {cause(error)}.{proxy_hint(uri)}"
        ) from error
    raise TrackerUnreachable(
        f"MLflow at {uri} has no run named {run!r} in the experiment {experiment!r}; the pages of "
        "`make ui` list the names"
    )
