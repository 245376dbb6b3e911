"""The LapFlow network: a Mixture-of-Transformers over the scales of a pyramid."""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import repeat
from typing import TypeAlias, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from models.axes import Band, Bands, to_images
from models.transformer.block import Block, Streams, scales_ahead
from models.transformer.config import TransformerConfig, check_image
from models.transformer.experts import (
    FinalExpert,
    linear,
    per_scale,
    tie_embeddings,
    tie_outputs,
    zero_linear,
)

_FREQUENCIES = 256
_LONGEST_PERIOD = 10_000.0

OnBuilt: TypeAlias = Callable[[nn.Module], object]
"""What is done with each part of a model as soon as it has its initial weights."""


def no_op(_part: nn.Module) -> None:
    """Leave a part as it is built: whole, and where tensors are made by default."""


BlockConditions: TypeAlias = Callable[
    [Sequence[int], tuple[Tensor, ...]], Iterable[tuple[Tensor, ...]]
]
"""Makes what each block is given for some scales from their conditions, coarse to fine.

Images of a scale are the first ones of the scale before it. So are its conditions, unless they were
made by a shared modulation.
"""


def repeat_conditions(
    _scales: Sequence[int], conditions: tuple[Tensor, ...]
) -> Iterable[tuple[Tensor, ...]]:
    """Give every block the same conditions."""
    return repeat(conditions)


class LapFlowTransformer(nn.Module):
    """Predicts the velocity of every active scale.

    With causal attention a scale's tokens see those of its own and of coarser scales only, so the
    outputs of coarse scales do not depend on finer ones, and leaving scales out that are not active
    is exact. With one scale it is a DiT. Every weight comes from torch's default generator, in
    module order; tying scales leaves the other weights as they would be.

    Parameters are named by the paper's k: ``blocks.3.experts.scale0.qkv.weight`` belongs to the
    finest scale. Names without ``scale`` are shared by all scales; what some scales share is named
    after the coarsest of them.

    Attributes:
        block_conditions: Makes what the blocks are given to modulate with; may be replaced by what
            makes modulations themselves, ahead of the blocks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        scales: int,
        channels: int,
        image_size: int,
        classes: int,
        on_built: OnBuilt = no_op,
    ) -> None:
        """Build the network with fresh weights.

        Args:
            config: Sizes of the transformer.
            scales: Number of scales, K.
            channels: Channels of the images.
            image_size: Height and width of the images.
            classes: Number of classes; label ``classes`` is the null label.
            on_built: Called with each part (the embeddings, one block after the other, the last
                layers) once it has its weights and ties; it may move or shard them in place, so
                that no more than one part is ever whole in memory.

        Raises:
            TransformerConfigError: The image does not divide into patches on every scale, a count
                is not positive, or scales are tied that there are not.
        """
        super().__init__()
        check_image(
            config, scales=scales, channels=channels, image_size=image_size, classes=classes
        )
        width, patch = config.width, config.patch_size
        self._config = config
        self._streams = Streams()
        self.block_conditions: BlockConditions = repeat_conditions
        self.time_embed = TimeEmbed(width)
        self.label_embed = LabelEmbed(classes=classes, width=width)
        self.patch_embed = _patch_embeddings(
            config, scales=scales, channels=channels, image_size=image_size
        )
        for part in (self.time_embed, self.label_embed, self.patch_embed):
            on_built(part)
        self.blocks = nn.ModuleList()
        for number in range(config.depth):
            block = Block(config, scales=scales, number=number)
            on_built(block)
            self.blocks.append(block)
        self.final = per_scale(
            scales, lambda _: FinalExpert(patch_size=patch, channels=channels, width=width)
        )
        tie_outputs(self.final, config.ties)
        on_built(self.final)
        if config.class_tokens:
            self.class_tokens = ClassTokens(count=config.class_tokens, width=width)
            on_built(self.class_tokens)
        if config.modulation == "shared":
            owners = self._modulation_owners(scales)
            self.modulation = nn.ModuleDict(
                {f"scale{k}": zero_linear(width, 6 * width) for k in owners}
            )
            on_built(self.modulation)

    def checkpoint_activations(self, scales: Collection[int]) -> None:
        """Let the experts of some scales recompute in the backward pass, to save memory.

        Args:
            scales: The scales, in the paper's numbering.
        """
        for block in self.blocks:
            cast(Block, block).checkpointed = frozenset(scales)

    def queue(self, streams: Streams) -> None:
        """Queue the blocks' work on streams; by default all of it is in one.

        Args:
            streams: Where the work of coarse scales and of the finest active scale goes.
        """
        self._streams = streams
        for block in self.blocks:
            cast(Block, block).streams = streams

    def forward(self, states: Bands, time: Float[Tensor, "b"], labels: Int[Tensor, "b"]) -> Bands:
        """Predict velocities.

        Args:
            states: States of the active scales, coarse to fine, any number from 1 to K. The first
                holds the whole batch; each other one the first images of the one before it, or, but
                with full attention, variations of them: a multiple of its images, of which
                neighbours see the same coarser tokens.
            time: Time of each image, in [0, 1]; float32, for bfloat16 cannot tell times apart.
            labels: Class of each image, or the null label.

        Returns:
            The velocities, in the shapes and precision of the states.
        """
        label = self.label_embed(labels)
        condition = F.silu(self.time_embed(time) + label)
        own_conditions = [to_images(condition, state.shape[0]) for state in states]
        tokens = tuple(
            embed(state) for embed, state in zip(self.patch_embed.values(), states, strict=False)
        )
        tokens = self._with_class_tokens(tokens, label)
        given = self._conditions_of_scales(own_conditions)
        ahead = scales_ahead(self._config.attention, len(tokens))
        if ahead:
            self._streams.fork((*tokens[:ahead], *given[:ahead]))
        for block, conditions in zip(self.blocks, self._conditions_of_blocks(given), strict=False):
            tokens = block(tokens, conditions)
        if ahead:
            self._streams.join(tokens[:ahead])
        tokens = (tokens[0][:, self._config.class_tokens :], *tokens[1:])
        return tuple(
            final(x, own).to(state.dtype)
            for final, x, own, state in zip(
                self.final.values(), tokens, own_conditions, states, strict=False
            )
        )

    def _with_class_tokens(
        self, tokens: tuple[Tensor, ...], label: Float[Tensor, "b d"]
    ) -> tuple[Tensor, ...]:
        """Put the class tokens before those of the coarsest scale, which every scale sees."""
        if not self._config.class_tokens:
            return tokens
        return (torch.cat([self.class_tokens(label), tokens[0]], dim=1), *tokens[1:])

    def _conditions_of_blocks(self, given: tuple[Tensor, ...]) -> Iterable[tuple[Tensor, ...]]:
        """What each block makes the modulation of each active scale from."""
        scales = range(len(self.patch_embed) - 1, -1, -1)[: len(given)]
        ahead = scales_ahead(self._config.attention, len(given))
        with self._streams.coarse():
            coarse = self.block_conditions(scales[:ahead], given[:ahead])
        rest = self.block_conditions(scales[ahead:], given[ahead:])
        return ((*before, *own) for before, own in zip(coarse, rest, strict=False))

    def _conditions_of_scales(self, conditions: list[Tensor]) -> tuple[Tensor, ...]:
        """What the modulation of each active scale is made from."""
        if self._config.modulation == "per_block":
            return tuple(conditions)
        owners = self._modulation_owners(len(self.patch_embed))
        return tuple(
            self.modulation[f"scale{k}"](own) for k, own in zip(owners, conditions, strict=False)
        )

    def _modulation_owners(self, scales: int) -> list[int]:
        """Scale whose modulation each scale uses, coarse to fine."""
        return [self._config.ties.owner(k, "modulation") for k in reversed(range(scales))]


def _patch_embeddings(
    config: TransformerConfig, *, scales: int, channels: int, image_size: int
) -> nn.ModuleDict:
    """Each scale's embedding of patches, tied where scales share weights."""
    patch = config.patch_size
    embeddings = per_scale(
        scales,
        lambda k: PatchEmbed(
            patch_size=patch,
            channels=channels,
            grid=(image_size >> k) // patch,
            width=config.width,
            spacing=2**k if config.positions == "aligned" else 1,
        ),
    )
    tie_embeddings(embeddings, config.ties)
    return embeddings


def sincos_positions(grid: int, width: int, *, spacing: int = 1) -> Float[Tensor, "n d"]:
    """Fixed 2-D positions of a square grid of tokens, row by row.

    A quarter of the width each holds the sine and cosine of the column and of the row.

    Args:
        grid: Tokens along a side.
        width: Width of a token; divisible by 4.
        spacing: Distance of neighbouring tokens, in patches of a finer grid that covers the same
            image. A token lies in the middle of the patches it covers.
    """
    steps = (torch.arange(grid, dtype=torch.float64) + 0.5) * spacing - 0.5
    rates = _LONGEST_PERIOD ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = steps[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns = waves.expand(grid, grid, -1)
    rows = columns.transpose(0, 1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1).float()


class PatchEmbed(nn.Module):
    """Band of one scale to tokens: patches, projected, plus positions.

    Args:
        patch_size: Side of a patch.
        channels: Channels of the band.
        grid: Patches along a side of the band.
        width: Width of a token.
        spacing: Distance of neighbouring patches in the unit of positions.
    """

    positions: Tensor

    def __init__(
        self, *, patch_size: int, channels: int, grid: int, width: int, spacing: int
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.projection = linear(patch_size**2 * channels, width)
        positions = sincos_positions(grid, width, spacing=spacing)
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, band: Band) -> Float[Tensor, "_b n d"]:
        """Embed a band, in the precision of the weights."""
        p = self.patch_size
        patches = rearrange(band, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        precision = self.projection.weight.dtype
        tokens: Tensor = self.projection(patches.to(precision))
        # Whoever casts the weights may leave the buffers as they are; DeepSpeed does.
        return tokens + self.positions.to(precision)


class TimeEmbed(nn.Module):
    """Time to a conditioning vector: 256 sinusoids of 1000 t and a two-layer MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = linear(_FREQUENCIES, width, std=0.02)
        self.output = linear(width, width, std=0.02)

    def forward(self, time: Float[Tensor, "b"]) -> Float[Tensor, "b d"]:
        """Embed one time for each image."""
        # In at least float32, and not in a buffer that a cast of the module would round: at
        # 1000 t a rate with eight bits is off by radians.
        time = time.to(torch.promote_types(time.dtype, torch.float32))
        half = torch.arange(_FREQUENCIES // 2, device=time.device, dtype=time.dtype)
        rates = torch.exp(half * (-math.log(_LONGEST_PERIOD) / (_FREQUENCIES // 2)))
        angles = 1000 * time[:, None] * rates
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)
        hidden = F.silu(self.hidden(waves.to(self.hidden.weight.dtype)))
        embedded: Tensor = self.output(hidden)
        return embedded


class LabelEmbed(nn.Module):
    """Table of class vectors; the last row is the null label that guidance uses."""

    def __init__(self, *, classes: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(classes + 1, width)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, labels: Int[Tensor, "b"]) -> Float[Tensor, "b d"]:
        """Look up one vector for each image."""
        embedded: Tensor = self.table(labels)
        return embedded


class ClassTokens(nn.Module):
    """In-context class tokens: a label's vector once for each of some learned positions."""

    def __init__(self, *, count: int, width: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.empty(count, width))
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, label: Float[Tensor, "b d"]) -> Float[Tensor, "b count d"]:
        """Make the tokens of each image."""
        return label[:, None] + self.positions
