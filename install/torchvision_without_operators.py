"""Lets PyPI's torchvision be imported beside a torch without CUDA; install.sh puts it into `.venv`.

PyPI's torchvision is a CUDA build, whose compiled operators cannot load there, and its import stops
at the missing operator `nms`. Where no CPU build of torchvision can be had, two declarations are
enough: all that is Python works, and `torchvision.ops` says by itself that it has no operators.

Python imports this file at its start, by the line in `torchvision_without_operators.pth`. So it
imports nothing itself, and waits until somebody imports torchvision.
"""

import sys


class DeclareOperators:
    """A finder that finds nothing, and is gone when it has been asked for torchvision."""

    library = None  # an operator is gone when its library object is

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        """Declare the operators if it is torchvision that is about to be imported."""
        if name == "torchvision" and cls in sys.meta_path:
            sys.meta_path.remove(cls)
            import torch

            cls.library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                cls.library.define(
                    f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )


sys.meta_path.insert(0, DeclareOperators)
