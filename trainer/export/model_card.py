"""The model card of an exported folder: Markdown with a head of YAML, as model hubs read it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.console import visible
from trainer.checkpoint.manifest import Manifest
from trainer.evaluation.model_record import ModelRecord
from trainer.evaluation.reports import MeasuredDistance

NEEDED = (
    "torch>=2.13.0,<2.14",
    "diffusers>=0.39.0,<0.40",
    "einops>=0.8.2",
    "jaxtyping>=0.3.11",
    "torchdiffeq>=0.2.5",
    "psutil>=7.2.2",
    "pydantic>=2.14.3",
    "tenacity>=9.2.1",
    "xxhash>=3.8.2",
)
"""What drawing needs of what the project needs, as pip knows it."""


def install() -> str:
    """Install this project's packages and what they need to draw, which is far less than all."""
    needed = " ".join(f"'{each}'" for each in NEEDED)
    return f"```bash\npip install {needed}\npip install --no-deps .\n```\n"


def pipeline(folder: str, *, on_latents: bool) -> str:
    """Draw images, or latents where images take an autoencoder."""
    drawn = "latents" if on_latents else "images"
    more = ', output_type="latent"' if on_latents else ""
    return _block(
        "import torch",
        "from trainer.export.diffusers_pipeline import LapFlowPipeline",
        "",
        f"pipeline = LapFlowPipeline.from_pretrained({folder!r})",
        "generator = torch.Generator().manual_seed(0)",
        f"{drawn} = pipeline([0], num_inference_steps=40, generator=generator{more}).images",
    )


def model(folder: str, *, variant: str | None = None) -> str:
    """Load the network by diffusers."""
    chosen = "" if variant is None else f", variant={variant!r}"
    return _block(
        "from trainer.export.diffusers_model import LapFlowTransformer2DModel",
        "",
        f"model = LapFlowTransformer2DModel.from_pretrained({folder!r}{chosen})",
    )


def torch_alone(folder: str, record: ModelRecord, file: str) -> str:
    """Build the network, load its weights, and draw what it works on."""
    flow, shape = record.flow, record.shape
    size = f"channels={shape.channels}, image_size={shape.size}"
    return _block(
        "import torch",
        "from safetensors.torch import load_file",
        "",
        "from models.flow.flow import Flow, FlowConfig",
        "from models.flow.sampler import sample",
        "from models.flow.sampler_config import SamplerConfig",
        "from models.transformer.config import Ties, TransformerConfig",
        "from models.transformer.lapflow import LapFlowTransformer",
        "",
        f"config = {record.transformer!r}",
        "model = LapFlowTransformer(",
        f"    config, scales={flow.scales}, {size}, classes={shape.classes}",
        ")",
        f"model.load_state_dict(load_file({f'{folder}/{file}'!r}))",
        "model.eval()",
        "",
        f"flow = Flow({flow!r})",
        f"noise = torch.randn(1, flow.noise_size({size}))",
        "drawn = sample(",
        "    model,",
        "    flow=flow,",
        "    config=SamplerConfig(steps=40),",
        "    noise=noise,",
        "    labels=torch.tensor([0]),",
        f"    {size}, null_label={shape.classes},",
        ").images",
    )


def _block(*lines: str) -> str:
    code = "\n".join(lines)
    return f"```python\n{code}\n```\n"


_LATENTS = """
The model draws latents. For pictures, give `LapFlowPipeline.from_pretrained` the autoencoder of its
training as `vae=AutoencoderKL.from_pretrained(…)`, and leave `output_type` out. It is not in this
folder: {autoencoder}.
"""


def _meaning(weights: str) -> str:
    """Say what weights are."""
    if weights == "master":
        return "weights as trained, without averaging"
    _, _, decay = weights.partition(":")
    return "moving average of the weights" + (f", of decay {decay}" if decay else "")


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """One file of weights.

    Attributes:
        name: Its name in the folder.
        weights: "ema", "ema:0.999" or "master".
        sha256: Hash of its bytes, in hexadecimal.
    """

    name: str
    weights: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a model card tells; it names no place outside the folder.

    Attributes:
        folder: Name of the folder.
        manifest: The checkpoint.
        model: Its model.
        files: The weights; the first file is the one that is loaded by default.
        results: What was measured.
    """

    folder: str
    manifest: Manifest
    model: ModelRecord
    files: Sequence[WeightsFile]
    results: Sequence[MeasuredDistance]

    def text(self) -> str:
        """Return the card."""
        sections = {
            "Model": _table(self._model()),
            "Files": self._files(),
            "Use with diffusers": self._diffusers(),
            "Use with torch alone": "The same network without diffusers:\n\n"
            + torch_alone(self.folder, self.model, self.files[0].name),
            "Training": _table(self._training()),
            "Results": self._results(),
            "Limits": self._limits(),
            "License": "The checkpoint does not say under which license these weights may be used. "
            "Ask whoever trained them, and add `license:` to the head of this file before you "
            "publish it.",
        }
        body = "\n".join(f"## {title}\n\n{text.strip()}\n" for title, text in sections.items())
        return f"{self._head()}\n# {_cell(self.manifest.run)}\n\n{self._summary()}\n\n{body}"

    def _head(self) -> str:
        # Hubs have a task for models without conditions, and none for models of classes.
        task = [] if self._by_class else ["pipeline_tag: unconditional-image-generation"]
        tags = ["lapflow", "flow-matching", "image-generation"]
        tags += ["class-conditional"] if self._by_class else []
        lines = ["library_name: diffusers", *task, "tags:", *(f"- {tag}" for tag in tags)]
        # "fid" is the distance of Inception's features alone.
        names = sorted({_metric(result.distance.features) for result in self.results})
        lines += ["metrics:", *(f"- {json.dumps(name)}" for name in names)] if names else []
        return "\n".join(("---", *lines, "---", ""))

    @property
    def _by_class(self) -> bool:
        return self.model.shape.classes > 1

    def _summary(self) -> str:
        what = "Class-conditional image" if self._by_class else "Image"
        return (
            f"{what} generation by LapFlow, flow matching over the scales of a "
            f"Laplacian pyramid: the weights of the run {_code(self.manifest.run)} after "
            f"{self.manifest.images:,} training images."
        )

    def _model(self) -> dict[str, object]:
        config, flow, shape = self.model.transformer, self.model.flow, self.model.shape
        parameters = sum(math.prod(sizes) for sizes in self.manifest.parameters.values())
        ties = config.ties
        pixels = shape.size * (self.model.codec.factor if self.model.on_latents else 1)
        times = flow.stages.critical_times
        return {
            "architecture": "LapFlow, a Mixture-of-Transformers with experts for each scale",
            "parameters": f"{parameters:,}",
            "depth, width, heads": f"{config.depth}, {config.width}, {config.heads}",
            "patch size": config.patch_size,
            "attention": config.attention + (", QK-norm" if config.qk_norm else ""),
            "class tokens": config.class_tokens or None,
            "scales": flow.scales,
            "critical times": ", ".join(map(str, times)) or None,
            "scales that share weights": ", ".join(map(str, ties.scales)) or None,
            "what they share": ", ".join(ties.parts) if ties.scales else None,
            "path, noise": f"{flow.path}, {flow.noise}",
            "works on": f"{'latents' if self.model.on_latents else 'images in [-1, 1]'}, "
            f"{shape.channels} x {shape.size} x {shape.size}",
            "image size": f"{pixels} x {pixels}",
            "classes": f"{shape.classes}; labels 0 … {shape.classes - 1}, and {self._null_label()}",
        }

    def _null_label(self) -> str:
        if self.model.label_dropout == 0.0:
            return "no null label was trained: there is no guidance"
        return f"{self.model.shape.classes} is the null label of guidance"

    def _files(self) -> str:
        rows = [
            f"| `{file.name}` | {_meaning(file.weights)} | `{file.sha256}` |" for file in self.files
        ]
        return "\n".join(("| file | weights, float32 | SHA-256 |", "| --- | --- | --- |", *rows))

    def _diffusers(self) -> str:
        text = (
            "No code is in this folder. The classes are in the packages of `lapflow-trainer`, "
            "which no index has: clone the project, and in the folder of the clone type\n\n"
            f"{install()}\nThen, beside this folder:\n\n"
        )
        text += pipeline(self.folder, on_latents=self.model.on_latents)
        if self.model.on_latents:
            text += _LATENTS.format(autoencoder=self._autoencoder())
        text += "\nThe network by itself:\n\n" + model(self.folder)
        for other in self.files[1:]:
            text += f"\nThe other weights ({other.weights}):\n\n"
            text += model(self.folder, variant=other.weights)
        return text

    def _autoencoder(self) -> str:
        codec = self.model.codec
        return (
            f"an `AutoencoderKL` with {codec.channels} channels and {codec.factor} pixels for one "
            f"element (digest of architecture and weights {_code(self.model.autoencoder_sha256)})"
        )

    def _training(self) -> dict[str, object]:
        manifest = self.manifest
        setting = _Science(manifest.science)
        clip = setting("optim", "clip_norm")
        return {
            "images seen": f"{manifest.images:,}",
            "updates": _count(manifest.train_state.get("updates")),
            "images per update": _count(setting("train", "global_batch")),
            "optimizer": _format_named(
                "AdamW",
                {
                    "learning rate": setting("optim", "learning_rate"),
                    "β₁": setting("optim", "beta1"),
                    "β₂": setting("optim", "beta2"),
                    "ε": setting("optim", "epsilon"),
                    "weight decay": setting("optim", "weight_decay"),
                    "gradient norm at most": clip or None,
                    "warm-up images": setting("optim", "warmup_images") or None,
                    "then": setting("optim", "decay"),
                },
            ),
            "EMA decay": setting("train", "ema", "decay"),
            "label dropout": setting("train", "label_dropout"),
            "precision": setting("engine", "precision"),
            "seed": setting("train", "seed"),
            "data set": setting("data", "name"),
            "SHA-256 of its index": setting("data_set", "index_sha256"),
            "saved": manifest.saved_at,
            "checkpoint": (
                f"attempt {manifest.attempt}, configuration {manifest.config_fingerprint}"
            ),
            "versions": ", ".join(f"{name} {v}" for name, v in sorted(manifest.versions.items())),
        }

    def _results(self) -> str:
        if not self.results:
            return "No evaluation of this checkpoint was found beside it."
        head = ("weights", "features", "Fréchet distance", "real images", "samples", "sampler")
        rows = [
            (
                _cell(measurement.weights),
                _code(distance.features),
                f"{distance.frechet:.4g}",
                "" if real is None else f"{real.frechet:.4g}",
                f"{measurement.samples:,}",
                _code(_sampler(measurement.sampler)) + _drawn_in(measurement.precision),
            )
            for _, measurement, distance in self.results
            for real in [distance.real]
        ]
        lines = [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]
        return (
            "Samples against held-out real images; lower is better. “Real images” is what as "
            "many training images reach in their place. Distances of different features do not "
            "compare.\n\n" + "\n".join(lines)
        )

    def _limits(self) -> str:
        return (
            f"The model draws the {self.model.shape.classes} classes of its training data at one "
            "size, and nothing else; it takes no text. It repeats what its data shows, with its "
            "gaps and biases. There is no filter of its output."
        )


class _Science:
    """Looks a setting up; older checkpoints lack some."""

    def __init__(self, science: Mapping[str, Any]) -> None:
        self._science = science

    def __call__(self, *path: str) -> Any:
        value: Any = self._science
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value


def _metric(features: str) -> str:
    return "fid" if features == "inception" else f"frechet_{features}"


def _drawn_in(precision: str) -> str:
    return f", in {precision}" if precision else ""  # older reports do not tell


def _sampler(settings: Mapping[str, Any]) -> str:
    known = [f"{settings['solver']}"] if "solver" in settings else []
    if "steps" in settings and settings.get("solver") != "dopri5":
        known.append(f"{settings['steps']} steps")
    if "guidance_scale" in settings:
        known.append(f"guidance {settings['guidance_scale']}")
    return ", ".join(known) or "unknown"


def _count(value: object) -> str | None:
    return f"{value:,}" if isinstance(value, int) else None


def _format_named(name: str, values: Mapping[str, object]) -> str:
    known = [f"{key} {value}" for key, value in values.items() if value is not None]
    return f"{name} ({', '.join(known)})" if known else name


def _table(values: Mapping[str, object]) -> str:
    rows = [f"| {name} | {_cell(value)} |" for name, value in values.items() if value is not None]
    return "\n".join(("| | |", "| --- | --- |", *rows))


def _cell(value: object) -> str:
    """Escape what would end a cell or be read as HTML or Markdown."""
    return re.sub(r"([\\`*_|<>\[\]&~#$]|:(?=//))", r"\\\1", _line(value))


def _code(value: object) -> str:
    """Quote a value as code, in a table too."""
    return f"`{re.sub(r'[`|]', ' ', _line(value))}`"


def _line(value: object) -> str:
    return visible(" ".join(str(value).split()))
