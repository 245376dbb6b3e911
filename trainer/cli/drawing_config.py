"""Settings of the commands that draw, read without torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field

from cluster.contract import ClusterConfig
from models.flow.sampler_config import SamplerConfig
from trainer.config.reading import ConfigError
from trainer.evaluation.config import FormatName, ModelSource, PrecisionChoice, SamplerChoice


@dataclass(frozen=True, kw_only=True)
class SampleConfig(ModelSource):
    """What to draw.

    Attributes:
        output: PNG file to write, or with `n` the folder or `s3://…` for the samples alone; None is
            samples.png, or the folder samples.
        n: How many samples to draw into a set, by all workers; None draws a grid.
        format: Of a set: "png" files in one folder for each class, one "npz" file as ADM's
            evaluator reads it, or "mds" shards.
        classes: Classes to draw: a row of the grid each, or equal parts of a set. None draws the
            first ten in a grid, the first three in a film, and all in a set.
        columns: Images per class in a grid; times of a film; samples of an interpolation.
        share_coarse: So many samples are variations of one layout: they share the noise of all
            scales but the finest, which is drawn once for all of them. A grid has a row for each
            layout, of each class as many as `columns` has room for, or one. With 1 each sample
            has a layout of its own.
        film: Draw instead what each scale held at each time, for one sample of each class.
        interpolate: Two seeds, `3:5`; draw what lies between their samples, a row for each class.
        seed: Seed of the noise.
        batch: Most images in one network call.
        precision: What the network computes in: "fp32", "tf32" (a GPU's faster products of
            float32) or "bf16"; "auto" is bf16 on a GPU and fp32 elsewhere.
        sampler: Changes to the run's own `eval.sampler`: solver, steps and guidance.
        cluster: Who draws a set; one process of this machine, unless set.
    """

    output: str | None = field(default=None, metadata={"place": "uri"})
    n: Annotated[int, Field(ge=1)] | None = None
    format: FormatName = "png"
    classes: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    columns: Annotated[int, Field(ge=1)] = 10
    share_coarse: Annotated[int, Field(ge=1)] = 1
    film: bool = False
    interpolate: str | None = None
    seed: Annotated[int, Field(ge=0)] = 1
    batch: Annotated[int, Field(ge=1)] = 64
    precision: PrecisionChoice = "auto"
    sampler: SamplerChoice = field(default_factory=SamplerChoice)
    cluster: ClusterConfig = field(
        default_factory=lambda: ClusterConfig(backend="local", workers=1)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes is not None and not self.classes:
            raise ConfigError(
                "classes=[] names no class; name some, as in classes=[3,5], or leave it away to "
                "draw the first ten"
            )
        self.seeds()
        asked = [name for name in ("n", "film", "interpolate") if getattr(self, name)]
        if len(asked) > 1:
            raise ConfigError(f"{' and '.join(asked)} are asked for at once; draw one by one")
        if self.share_coarse > 1 and asked not in ([], ["n"]):
            raise ConfigError(
                f"share_coarse={self.share_coarse} is for grids and sets; leave it out with "
                f"{asked[0]}"
            )
        if self.n is None:
            return
        if self.device != "auto":
            raise ConfigError(
                f"device={self.device} is for a grid; with n={self.n} each worker has a device of "
                "its own: a GPU where there are some, unless cluster.gpus_per_worker=0"
            )
        if self.output is not None and Path(self.output).suffix in (".png", ".npz"):
            raise ConfigError(
                f"output={self.output} names a file, but n={self.n} samples go into a folder; give "
                "one, or s3://bucket/folder"
            )

    def seeds(self) -> tuple[int, int] | None:
        """Return the seeds to interpolate between; None if that is not asked for.

        Raises:
            ConfigError: The text does not name two.
        """
        if self.interpolate is None:
            return None
        found = re.fullmatch(r"(\d{1,18}):(\d{1,18})", self.interpolate)
        if found is None:
            raise ConfigError(
                f"interpolate={self.interpolate!r} must be two seeds, as in interpolate=3:5"
            )
        return int(found[1]), int(found[2])


@dataclass(frozen=True, kw_only=True)
class InpaintConfig(ModelSource):
    """What to fill in.

    Attributes:
        image: Picture of the size that the model draws.
        mask: Picture of the same size, white where the image is known.
        label: Class of the picture.
        output: PNG file to write.
        columns: How many results to draw.
        repeats: How often each solver step is made from fresh noise; more follow the known part
            more closely and cost as many times more.
        seed: Seed of the noise.
        precision: What the network computes in: "fp32", "tf32" or "bf16"; "auto" is bf16 on a GPU
            and fp32 elsewhere.
        sampler: Solver with fixed steps, and guidance.
    """

    image: str = field(metadata={"place": "path"})
    mask: str = field(metadata={"place": "path"})
    label: Annotated[int, Field(ge=0)]
    output: str = field(default="inpainted.png", metadata={"place": "path"})
    columns: Annotated[int, Field(ge=1)] = 6
    repeats: Annotated[int, Field(ge=1)] = 5
    seed: Annotated[int, Field(ge=0)] = 1
    precision: PrecisionChoice = "auto"
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
