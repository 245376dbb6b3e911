"""The commands and Python of a model card; the tests run them as they stand in written cards."""

from __future__ import annotations

from trainer.export.description import ModelDescription

NEEDED = (
    "torch>=2.13.0,<2.14",
    "diffusers>=0.39.0,<0.40",
    "einops>=0.8.2",
    "jaxtyping>=0.3.11",
    "torchdiffeq>=0.2.5",
    "psutil>=7.2.2",
    "pydantic>=2.14.3",
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


def torch_alone(folder: str, description: ModelDescription, file: str) -> str:
    """Build the network, load its weights, and draw what it works on."""
    flow, shape = description.flow, description.shape
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
        f"config = {description.transformer!r}",
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
