"""The memory of a rank in one training step, by formula."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache

from cluster.placement import Placement
from trainer.engine.ema_room import room_bytes
from trainer.planning.exchange import bundles
from trainer.planning.workload import FULL_BYTES, Workload


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes that one rank holds.

    Attributes:
        weights: Weights of the forward pass.
        gradients: Gradients.
        optimizer: Two AdamW moments, and the float32 master weights where they are a copy.
        ema: Moving averages of the weights, in float32.
        activations: Estimate of what the forward pass keeps for the backward pass, or of what the
            update of the plain engine needs in its place, if that is more.
        buffers: What collectives send from and receive into.
        host: Optimizer state and moving average in host memory, where they are offloaded.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    buffers: int
    host: int = 0

    @property
    def parts(self) -> dict[str, int]:
        """Bytes on the device by part."""
        return {part.name: getattr(self, part.name) for part in fields(self) if part.name != "host"}

    @cached_property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self.parts.values())


def rank_memory(workload: Workload, placement: Placement, *, zero_stage: int) -> RankMemory:
    """Predict the bytes on each rank, with AdamW.

    ZeRO 1 splits optimizer state and moving average over the ranks that hold the same weights,
    ZeRO 2 the gradients too, ZeRO 3 the weights too. ZeRO 1 adds gradients up whole over several
    micro-batches; with one they are reduced as they come and kept split. Of a sharded scale N/E
    ranks hold each 1/E, so what is split is 1/N of it whatever E is: sharding a scale saves weights
    and whole gradients, not optimizer state. ZeRO keeps float32 master weights in either precision,
    stage 0 only in bf16.

    A sharded scale keeps its own tokens as a replicated one does, and of the MLP's hidden units
    what comes before the activation alone, which is computed again; without `workload.regathers`
    the group's tokens instead of its own at the input of two projections of a block. ZeRO 1 to 3
    reduce through whole buckets of their own, however few the gradients are. The allocator's waste,
    and the update's own working memory, which is needed when activations are gone, are not counted.

    Args:
        workload: The training step.
        placement: Where the experts are.
        zero_stage: 0 (no ZeRO) to 3.
    """
    element = workload.element_bytes
    shards = workload.shards(placement)
    held = sum(weights for weights, _ in shards)
    split = workload.split(placement)
    stateful = split if zero_stage >= 1 else held
    adds_up_split = zero_stage >= 2 or (zero_stage == 1 and workload.grad_accum_steps == 1)
    copies = 2 if element == FULL_BYTES and zero_stage == 0 else 3
    optimizer = FULL_BYTES * copies * stateful
    ema = FULL_BYTES * workload.averages * stateful
    away = optimizer + ema if workload.offload else ema if workload.ema_on_host else 0
    buffers = exchange_buffer_bytes(workload, placement)
    if workload.ema_on_host and not workload.offload:
        buffers += workload.averages * room_bytes(stateful)
    if zero_stage >= 1:
        # The second is filled while the first is under way; ZeRO-3 does with one.
        buckets = 2 if workload.hides_reduction(zero_stage) and zero_stage < 3 else 1
        # What ZeRO-1 reduces has been added up; the others reduce each micro-batch's own.
        reduced = workload.gradient_bytes if zero_stage == 1 else element
        buffers += buckets * reduced * workload.bucket_elements
    if zero_stage == 3:
        # What is used at once has to be there at once.
        least = max(held // workload.depth, *_largest_modulation(workload, placement))
        buffers += element * min(held, max(workload.kept_parameters, least))
    activations = activation_bytes(workload, placement)
    if zero_stage == 0 and element < FULL_BYTES and workload.grad_accum_steps == 1:
        # When they are gone, all gradients are there once more, in float32.
        activations = max(activations, FULL_BYTES * held)
    return RankMemory(
        weights=element * (split if zero_stage >= 3 else held),
        gradients=workload.gradient_bytes * (split if adds_up_split else held),
        optimizer=0 if workload.offload else optimizer,
        ema=0 if away else ema,
        activations=activations,
        buffers=buffers,
        host=away,
    )


def _joint_modulation(workload: Workload, placement: Placement) -> list[tuple[list[int], int]]:
    """Scales by their places whose modulation is made at once, and the ranks of their group."""
    together: dict[tuple[bool, int], list[int]] = {}
    for bundle in bundles(workload, placement):
        together.setdefault((bundle.ahead, bundle.ranks), []).extend(bundle.positions)
    return [(positions, ranks) for (_, ranks), positions in together.items()]


def _largest_modulation(workload: Workload, placement: Placement) -> Iterator[int]:
    """The weights of modulation that are used at once."""
    yield 0
    for positions, ranks in _joint_modulation(workload, placement):
        yield sum(workload.scales[i].modulation // ranks for i in positions)


def activation_bytes(workload: Workload, placement: Placement) -> int:
    """Estimate what is kept for the backward pass, and in it for the one block recomputed."""
    kept, again = 0, 0
    for load, ranks in zip(workload.scales, placement.ranks, strict=True):
        # In every block but the first: the hidden units once, and the tokens of other ranks.
        extra = 0
        if ranks > 1:
            others = 0 if workload.regathers else 2 * (ranks - 1)
            extra = load.tokens * (others * workload.width - workload.hidden)
        if load.activation_checkpointing:
            kept += load.max_images * load.recomputed_activations
            again = max(again, load.max_images * (load.block_activations + extra))
        else:
            kept += load.max_images * (load.activations + (workload.depth - 1) * extra)
    return workload.element_bytes * (kept + again)


@lru_cache(maxsize=64)
def exchange_buffer_bytes(workload: Workload, placement: Placement) -> int:
    """Count what expert groups send from and receive into; each group keeps the largest it needs.

    Of a bundle's T tokens, in numbers: the gradients of outputs and the tokens of the group, 2 E T
    d; what is dealt of the gradients of queries, keys and values and the own tokens, (E + 3) T d;
    gradients that are summed, E T d. Or modulation of all blocks but the first, 6 d (L - 1) of
    each image of the scales that it is made of at once.
    """
    if not placement.sharded:
        return 0
    most: dict[int, tuple[int, int]] = {}
    images = [load.max_images for load in workload.scales]
    blocks = 0 if workload.shared_modulation else workload.depth - 1
    for positions, ranks in _joint_modulation(workload, placement):
        modulated = 6 * workload.width * blocks * sum(images[i] for i in positions)
        sending, receiving = most.get(ranks, (0, 0))
        most[ranks] = max(sending, modulated), max(receiving, modulated)
    for bundle in bundles(workload, placement):
        ranks = bundle.ranks
        tokens = sum(images[i] * workload.scales[i].tokens for i in bundle.positions)
        own, again = workload.width * tokens, 1 if workload.regathers else 0
        dealt = (again * ranks + 3) * own
        sending, receiving = most[ranks]
        most[ranks] = (
            max(sending, dealt, ranks * own),
            max(receiving, dealt, (1 + again) * ranks * own),
        )
    return workload.element_bytes * sum(map(sum, most.values()))
