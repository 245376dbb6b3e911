"""How a run samples and measures itself, which commands on its checkpoints take over."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from typing import Literal

from models.flow.sampler_config import SamplerConfig
from pipelines.documents import validate_as
from trainer.checkpoint.manifest import Manifest
from trainer.config.evaluation import EvalConfig
from trainer.config.reading import from_dict
from trainer.evaluation.reports import EvaluationReport, evaluation_key
from trainer.storage.errors import MissingObject
from trainer.storage.kept import read_sealed
from trainer.storage.store import Store

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SamplerChoice:
    """What a command changes of the run's own sampler, `eval.sampler`; None changes nothing.

    Attributes:
        solver: "euler", "midpoint", "heun" or "ab2" with fixed steps, or "dopri5".
        steps: Steps over the whole time axis; dopri5 does not use them.
        absolute_tolerance: Error that dopri5 allows in one step, whatever the state.
        relative_tolerance: Error that dopri5 allows in one step, in proportion to the state.
        adaptive_group: Images that dopri5 integrates together, with common steps.
        guidance_scale: Classifier-free guidance scale; 1 is no guidance.
        guidance_interval: First and last time at which guidance acts; [0,1] is always.
    """

    solver: Literal["euler", "midpoint", "heun", "ab2", "dopri5"] | None = None
    steps: int | None = None
    absolute_tolerance: float | None = None
    relative_tolerance: float | None = None
    adaptive_group: int | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        self.over(SamplerConfig())  # refuses values that no sampler takes

    def over(self, own: SamplerConfig) -> SamplerConfig:
        """Return a run's own sampler with the changes."""
        changes = {name: value for name, value in asdict(self).items() if value is not None}
        return replace(own, **changes)


def own_eval(store: Store, manifest: Manifest) -> EvalConfig | None:
    """Return the settings by which a run measures a checkpoint at its end.

    Those of its report come first, which a later launch may have measured anew; without a report
    that can be believed it is those that the checkpoint records. None for older checkpoints, which
    record none.
    """
    key = evaluation_key(manifest.run, manifest.images, "report.json")
    try:
        report = validate_as(EvaluationReport, read_sealed(store, key))
        return from_dict(EvalConfig, report.settings, path="eval.")
    except MissingObject:
        pass
    except ValueError as error:  # damaged, or of a version that measured otherwise
        logger.warning("passing over the report %s: %s", store.uri(key), error)
    recorded = manifest.science.get("eval")
    return None if recorded is None else from_dict(EvalConfig, recorded, path="eval.")
