"""What the training step needs of an engine, and nothing more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeAlias

from pydantic import Field

from pipelines.domains import Checked

if TYPE_CHECKING:  # who only has settings read waits for no torch
    import torch
    from torch import Tensor, nn

    from models.transformer.lapflow import LapFlowTransformer, OnBuilt
    from trainer.state import Fragment

BuildModel: TypeAlias = "Callable[[OnBuilt], LapFlowTransformer]"
"""Builds a model with its initial weights, letting each part settle as soon as it is built."""

Arrange: TypeAlias = "Callable[[LapFlowTransformer], None]"
"""Says how a built model is computed: what recomputes, what is joined, on which streams."""


class EngineConfigError(ValueError):
    """An engine setting that cannot work, with the value and the fix."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig(Checked):
    """How weights, gradients and optimizer state are held and updated.

    Attributes:
        kind: "zero" is DeepSpeed ZeRO; "plain" is torch alone, which spreads no state, and on one
            device holds the same with fewer operations; "auto" is "plain" with one worker, unless
            `offload_optimizer` or `deepspeed` asks for DeepSpeed, and "zero" with more.
        zero_stage: ZeRO stage, 1 (optimizer state sharded), 2 (gradients too) or 3 (weights too).
        precision: Weights and activations; "bf16" keeps fp32 master weights, moments and EMA.
        tf32: On GPUs with precision "fp32", multiply matrices in TF32: 10 bits of mantissa instead
            of 23, at several times the speed. Sums stay in fp32.
        grad_accum_dtype: In what the gradients of an update's micro-batches are added up, with
            precision "bf16". In "bf16" a sum loses what is below 1/256 of it, and takes half the
            memory: 2 bytes less for each gradient that a rank keeps, which with ZeRO-1 are all.
            One micro-batch alone is not added up, and takes no more memory.
        micro_batch: Images per rank in one forward pass; None takes the rank's whole share.
        placement: Where the experts are: "replicated" on every rank; `{scale: E}` leaves every rank
            1/E of that scale's experts, and E neighbouring ranks exchange the scale's tokens;
            "auto" takes what `memory` asks for (`python -m trainer.plan`).
        memory: What `placement` "auto" takes: "fit" the fastest that fits the cluster's GPUs,
            "least" what takes the least memory, "fastest" the fastest of all, and the run is
            refused if that does not fit.
        activation_checkpointing: Scales whose experts recompute in the backward pass instead of
            keeping their activations; None is none of them, or with `placement` "auto" as few as
            have to.
        regather_tokens: Gather the tokens of sharded scales again in the backward pass; without, a
            rank keeps those of its whole group, which takes memory and saves traffic. None gathers
            again, or with `placement` "auto" does what serves `memory`.
        overlap_exchange: On GPUs, compute coarse scales, their exchange included, on a stream of
            their own beside the finest scale. It does nothing with ZeRO-3, which gathers weights on
            one stream, if the finest scale is sharded too, or with full attention.
        compile: "blocks" has torch compile what each scale computes in a block between attentions,
            when the first update meets it: fewer kernels, which is what a GPU waits for where a
            batch is small. Losses differ in their last digits from those of "off". It needs a C
            compiler on every node (C++ without a GPU), and does not go with ZeRO-3.
        offload_optimizer: Keep moments, fp32 weights and EMA in host memory and update them there.
        deepspeed: Passed on to DeepSpeed's own configuration, over what the fields above render.
            With `placement` "auto" and ZeRO-3, stage3_max_live_parameters and
            stage3_max_reuse_distance are chosen by `memory`, unless one of them is given.
    """

    kind: Literal["auto", "zero", "plain"] = "auto"
    zero_stage: int = 2
    precision: Literal["fp32", "bf16"] = "fp32"
    tf32: bool = True
    grad_accum_dtype: Literal["fp32", "bf16"] = "fp32"
    micro_batch: Annotated[int, Field(ge=1)] | None = None
    placement: Literal["auto", "replicated"] | dict[int, int] = "replicated"
    memory: Literal["fit", "least", "fastest"] = "fit"
    activation_checkpointing: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    regather_tokens: bool | None = None
    overlap_exchange: bool = True
    compile: Literal["off", "blocks"] = "off"
    offload_optimizer: bool = False
    deepspeed: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.zero_stage not in (1, 2, 3):
            raise EngineConfigError(
                f"zero_stage={self.zero_stage} does not exist; use 1 (optimizer state sharded), "
                "2 (gradients too) or 3 (weights too)"
            )
        scales = self.recomputed
        if len(set(scales)) < len(scales):
            raise EngineConfigError(
                f"activation_checkpointing={list(scales)} names a scale twice; name each once, as "
                f"in {sorted(set(scales))}"
            )

    @property
    def recomputed(self) -> tuple[int, ...]:
        """Scales whose experts recompute, where nothing is planned."""
        return self.activation_checkpointing or ()

    @property
    def regathers(self) -> bool:
        """Whether tokens are gathered again, where nothing is planned."""
        return self.regather_tokens is not False

    def has_overlap(self, world_size: int) -> bool:
        """Whether coarse scales have a stream of their own, where there are streams."""
        partitioned = self.kind_of(world_size) == "zero" and self.zero_stage == 3
        return self.overlap_exchange and not partitioned

    def kind_of(self, world_size: int) -> Literal["zero", "plain"]:
        """Which engine trains on so many ranks."""
        if self.kind != "auto":
            return self.kind
        wants_deepspeed = self.offload_optimizer or bool(self.deepspeed)
        return "plain" if world_size == 1 and not wants_deepspeed else "zero"

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights that the model computes with."""
        import torch

        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def sum_dtype(self, grad_accum_steps: int) -> torch.dtype:
        """Type of the sum of the gradients of so many micro-batches."""
        import torch

        return torch.bfloat16 if self.sum_precision(grad_accum_steps) == "bf16" else torch.float32

    def sum_precision(self, grad_accum_steps: int) -> Literal["fp32", "bf16"]:
        """Precision in which the gradients of so many micro-batches are added up."""
        summed = self.precision == "bf16" and grad_accum_steps > 1
        return self.grad_accum_dtype if summed else self.precision


@dataclass(frozen=True, kw_only=True)
class UpdateOutcome:
    """What one optimizer update did.

    Both are on the device, and to look at them is to wait for it.

    Attributes:
        applied: Bool, 0-D: false when a non-finite gradient on any rank made every rank skip the
            update.
        gradient_norm: Float32, 0-D: global gradient norm before clipping; infinite when skipped.
    """

    applied: Tensor
    gradient_norm: Tensor


class Engine(Protocol):
    """Forward, backward and update of a model over all ranks, with averages of the fp32 shards."""

    def __call__(
        self, states: tuple[Tensor, ...], time: Tensor, labels: Tensor
    ) -> tuple[Tensor, ...]:
        """Run the model in the engine's precision; results come back in float32."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of one micro-batch; `last` closes the accumulation of an update."""
        ...

    def update(
        self, *, learning_rate: float, ema_decays: Sequence[float] | Tensor
    ) -> UpdateOutcome:
        """Apply the accumulated gradient on all ranks, or on none when it is not finite.

        Args:
            learning_rate: Of this update.
            ema_decays: Of this update, one for each average, in the order of `EmaConfig.kinds`;
                numbers, or a tensor on the device, for which the host does not wait.
        """
        ...

    def fragments(self) -> Sequence[Fragment]:
        """Return live views of the fp32 shard this rank owns, by parameter name.

        They are to be asked for again after an update: an EMA on the host is then under way.
        """
        ...

    def load_fragments(self, updates: int) -> None:
        """Make the model follow fragments that were just overwritten; `updates` were applied."""
        ...

    def ema_weights(self) -> AbstractContextManager[nn.Module]:
        """Put the average of `EmaConfig.decay` into the model for a `with` block, on every rank."""
        ...

    def initial_weights(self) -> AbstractContextManager[nn.Module]:
        """Put the weights that training began with into the model, like `ema_weights`."""
        ...
