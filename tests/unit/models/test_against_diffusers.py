"""With one scale the network is a DiT: the one of diffusers, given the same weights.

diffusers' model is a port of the original DiT, written independently of ours: its own blocks,
attention, modulation, MLP, patch embedding, positions and label table. It departs from the original
in the frequencies of the time embedding, whose last one is 1/10000 instead of 10000^(-127/128);
ours are the original's, so that part (and no other) is told to follow them.
"""

import pytest
import torch
from torch import Tensor, nn

from models.transformer.config import TransformerConfig
from models.transformer.lapflow import LapFlowTransformer

DEPTH, WIDTH, HEADS = 3, 48, 4
CHANNELS, SIZE, PATCH, CLASSES = 4, 16, 2, 7


@pytest.fixture(scope="module")
def ours() -> LapFlowTransformer:
    torch.manual_seed(0)
    config = TransformerConfig(depth=DEPTH, width=WIDTH, heads=HEADS, patch_size=PATCH)
    model = LapFlowTransformer(
        config, scales=1, channels=CHANNELS, image_size=SIZE, classes=CLASSES
    )
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter.shape[-1] if parameter.ndim > 1 else 4
            nn.init.normal_(parameter, std=fan_in**-0.5)
    return model.eval()


@pytest.fixture(scope="module")
def theirs(ours: LapFlowTransformer) -> nn.Module:
    from diffusers import DiTTransformer2DModel
    from diffusers.models.embeddings import Timesteps

    model = DiTTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        in_channels=CHANNELS,
        num_layers=DEPTH,
        sample_size=SIZE,
        patch_size=PATCH,
        num_embeds_ada_norm=CLASSES,
        norm_eps=1e-6,
    ).eval()
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
    model.load_state_dict(converted(ours.state_dict()) | buffers(model))
    return model


def converted(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under diffusers' names."""
    theirs: dict[str, Tensor] = {}

    def put(name: str, weight: Tensor, bias: Tensor) -> None:
        theirs[f"{name}.weight"], theirs[f"{name}.bias"] = weight, bias

    def pair(name: str) -> tuple[Tensor, Tensor]:
        return weights[f"{name}.weight"], weights[f"{name}.bias"]

    kernel, bias = pair("patch_embed.scale0.projection")
    put("pos_embed.proj", kernel.reshape(WIDTH, CHANNELS, PATCH, PATCH), bias)
    for layer in range(DEPTH):
        source, target = f"blocks.{layer}.experts.scale0", f"transformer_blocks.{layer}"
        embedding = f"{target}.norm1.emb"
        put(f"{embedding}.timestep_embedder.linear_1", *pair("time_embed.hidden"))
        put(f"{embedding}.timestep_embedder.linear_2", *pair("time_embed.output"))
        theirs[f"{embedding}.class_embedder.embedding_table.weight"] = weights[
            "label_embed.table.weight"
        ]
        put(f"{target}.norm1.linear", *pair(f"{source}.modulation"))
        thirds = zip(*(tensor.chunk(3) for tensor in pair(f"{source}.qkv")), strict=True)
        for name, third in zip(("to_q", "to_k", "to_v"), thirds, strict=True):
            put(f"{target}.attn1.{name}", *third)
        put(f"{target}.attn1.to_out.0", *pair(f"{source}.projection"))
        put(f"{target}.ff.net.0.proj", *pair(f"{source}.mlp_hidden"))
        weight, bias = pair(f"{source}.mlp_output")
        put(f"{target}.ff.net.2", weight.T, bias)
    put("proj_out_1", *pair("final.scale0.modulation"))
    # A patch's numbers are (channel, row, column) here and (row, column, channel) there.
    put(
        "proj_out_2",
        *(
            tensor.unflatten(0, (CHANNELS, PATCH * PATCH)).transpose(0, 1).flatten(0, 1)
            for tensor in pair("final.scale0.projection")
        ),
    )
    return theirs


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: b for name, b in model.named_buffers() if name in model.state_dict()}


def test_one_scale_is_the_dit_of_diffusers(ours: LapFlowTransformer, theirs: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(5, CHANNELS, SIZE, SIZE, generator=generator)
    time = torch.tensor([0.0, 0.013, 0.5, 0.875, 1.0])
    labels = torch.tensor([0, 3, 6, CLASSES, 1])  # with the null label
    with torch.no_grad():
        (got,) = ours((states,), time, labels)
        want = theirs(states, timestep=1000 * time, class_labels=labels).sample
    assert want.std() > 0.3
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_every_weight_of_ours_reaches_theirs(ours: LapFlowTransformer, theirs: nn.Module) -> None:
    shared = {"time_embed", "label_embed"}
    copied = sum(
        p.numel() * (DEPTH if name.split(".")[0] in shared else 1)
        for name, p in ours.named_parameters()
    )
    assert copied == sum(p.numel() for p in theirs.parameters())
