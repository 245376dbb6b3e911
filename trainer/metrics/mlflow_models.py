"""Checkpoints of a run as MLflow's models, and the best of them in its registry."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

_BEST = "best"
_KIND = "checkpoint"
_MODEL = "model_id"
_PROTOCOL = ".protocol"
_PLACE = "lapflow.place"


class RunModels:
    """The models of one run. What is there already is left as it is.

    Args:
        client: Speaks to MLflow.
        experiment: ID of the run's experiment.
        run: Name of the training run, and of the registered model unless another run has it.
        run_id: MLflow's ID of the run.
        place: Tells the place of the training run from all others.
    """

    def __init__(self, client: Any, experiment: str, *, run: str, run_id: str, place: str) -> None:
        self._client = client
        self._experiment = experiment
        self._run = run
        self._run_id = run_id
        self._place = place

    def add(self, images: int, *, uri: str) -> None:
        """Record a checkpoint.

        MLflow has its address and none of its bytes.

        Args:
            images: Images that it has seen.
            uri: Where it is.
        """
        from mlflow.entities import LoggedModelOutput

        model_id = self.find(images)
        if model_id is None:
            about = {_KIND: uri, "images": str(images)}
            model_id = self._client.create_logged_model(
                self._experiment,
                name=self._name(images),
                source_run_id=self._run_id,
                params=about,
                tags=about,
                model_type=_KIND,
            ).model_id
        outputs = self._client.get_run(self._run_id).outputs
        if model_id not in {each.model_id for each in outputs.model_outputs}:
            self._client.log_outputs(self._run_id, [LoggedModelOutput(model_id, images)])
        self._client.finalize_logged_model(model_id, "READY")

    def find(self, images: int) -> str | None:
        """Return the ID of the model that a checkpoint is; None if it was not recorded."""
        wanted = f"source_run_id = '{self._run_id}' and name = '{self._name(images)}'"
        found = self._client.search_logged_models([self._experiment], wanted, max_results=1)
        return str(found[0].model_id) if found else None

    def first_protocol(self, group: str) -> str | None:
        """Return the protocol of the first figure that was ranked; None if there is none.

        Args:
            group: First part of the names of figures that count.
        """
        versions = self._client.search_model_versions(f"run_id = '{self._run_id}'")
        for each in sorted(versions, key=lambda version: int(version.version)):
            for tag, told in each.tags.items():
                if tag.startswith(f"{group}/") and tag.endswith(_PROTOCOL):
                    return str(told)
        return None

    def rank(self, model_id: str, *, figure: str, value: float, protocol: str) -> None:
        """Give the model of the lowest figure the alias `best` in the registry.

        Figures of one protocol are compared: those that most models have, of equally many this
        one's.

        Args:
            model_id: The model that was measured.
            figure: Name of the figure's curve.
            value: What the model has.
            protocol: How it was measured.
        """
        client, name = self._client, self._registered()
        versions = client.search_model_versions(f"name = '{name}'")
        mine = next((each for each in versions if each.tags.get(_MODEL) == model_id), None)
        if mine is None:
            model = client.get_logged_model(model_id)
            mine = client.create_model_version(
                name,
                source=model.artifact_location,
                run_id=self._run_id,
                model_id=model_id,
                tags={_MODEL: model_id, _KIND: model.params[_KIND]},
                await_creation_for=None,
            )
        client.set_model_version_tag(name, mine.version, figure, repr(value))
        client.set_model_version_tag(name, mine.version, f"{figure}{_PROTOCOL}", protocol)
        own = _kind(figure), protocol
        curves: defaultdict[tuple[str, str], dict[str, float]] = defaultdict(dict)
        curves[own][mine.version] = value
        for each in versions:
            for tag, told in each.tags.items():
                measured = tag.removesuffix(_PROTOCOL)
                # What this one had before may have been measured otherwise.
                is_before = (each.version, measured) == (mine.version, figure)
                if tag.endswith(_PROTOCOL) and measured in each.tags and not is_before:
                    curves[_kind(measured), told][each.version] = float(each.tags[measured])
        values = curves[max(curves, key=lambda curve: (len(curves[curve]), curve == own))]
        best = min(values, key=lambda version: values[version])
        client.set_registered_model_alias(name, _BEST, best)

    def _registered(self) -> str:
        """Return the name of the registered model, which is made if there is none."""
        for name in (self._run, f"{self._run}-{self._place[:8]}"):
            found = self._client.search_registered_models(f"name = '{name}'", max_results=1)
            if not found:
                self._client.create_registered_model(name, tags={_PLACE: self._place})
            elif found[0].tags.get(_PLACE) != self._place:
                continue  # a run of the same name in another store
            return name
        raise ValueError(f"the registered model {name} is of another run")

    def _name(self, images: int) -> str:
        return f"{self._run}-{images:012d}"


def _kind(figure: str) -> str:
    """Return a figure's name without its group, which tells its protocol at most."""
    return figure.partition("/")[2]
