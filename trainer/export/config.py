"""Settings of an export, read without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipelines.domains import Checked
from trainer.config.reading import ConfigError
from trainer.evaluation.config import decay_of


@dataclass(frozen=True, kw_only=True)
class ExportSettings(Checked):
    """What to export, and where to.

    Attributes:
        output: Folder or file to write.
        file: "folder" for diffusers and torch, or "safetensors" for one file of weights.
        weights: "ema", "ema:0.999" for one of `train.ema.decays`, "master" for the weights without
            averaging, or, in a folder, "both": then the EMA is loaded by default, and master as
            diffusers' variant of that name.
        overwrite: Replace the file, or the folder of an earlier export, at `output`.
    """

    output: str = field(metadata={"place": "path"})
    file: Literal["folder", "safetensors"] = "folder"
    weights: str = "ema"
    overwrite: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights != "both":
            decay_of(self.weights)  # refuses what names none
        if self.file == "safetensors" and self.weights == "both":
            raise ConfigError(
                "weights=both does not fit into file=safetensors, one set of weights; export twice "
                "with weights=ema and weights=master, or set file=folder"
            )
