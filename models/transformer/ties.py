"""Tied scales: experts that use another scale's weights for some of their parts."""

from collections.abc import Mapping

from torch import nn

from models.transformer.config import Part, Ties

_BLOCK_PARTS: Mapping[Part, tuple[str, ...]] = {
    "attention": ("qkv", "query_norm", "key_norm", "projection"),
    "mlp": ("mlp_hidden", "mlp_output"),
    "modulation": ("modulation",),
}
_EMBEDDING_PARTS: Mapping[Part, tuple[str, ...]] = {"embedding": ("projection",)}
_OUTPUT_PARTS: Mapping[Part, tuple[str, ...]] = {"output": ("modulation", "projection")}


def tie_blocks(experts: nn.ModuleDict, ties: Ties) -> None:
    """Tie the experts of one block."""
    _tie(experts, ties, _BLOCK_PARTS)


def tie_embeddings(experts: nn.ModuleDict, ties: Ties) -> None:
    """Tie the patch embeddings; each scale keeps its own positions."""
    _tie(experts, ties, _EMBEDDING_PARTS)


def tie_outputs(experts: nn.ModuleDict, ties: Ties) -> None:
    """Tie the last layers."""
    _tie(experts, ties, _OUTPUT_PARTS)


def _tie(experts: nn.ModuleDict, ties: Ties, parts: Mapping[Part, tuple[str, ...]]) -> None:
    for k in range(len(experts)):
        for part, names in parts.items():
            owner = ties.owner(k, part)
            if owner != k:
                for name in names:
                    _borrow(experts[f"scale{k}"], name, experts[f"scale{owner}"])


def _borrow(borrower: nn.Module, name: str, lender: nn.Module) -> None:
    """Let a module use a part of another.

    The part is not registered with the borrower, so that every parameter has one name: optimizers,
    checkpoints and counts see it once.
    """
    delattr(borrower, name)
    object.__setattr__(borrower, name, getattr(lender, name))
