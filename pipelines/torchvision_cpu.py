"""Let torchvision, which streaming imports, load beside a torch without CUDA.

torchvision's compiled operators need the CUDA libraries, and without them `import torchvision`
stops at the missing operator `nms`. Declaring the two schemas first is enough: what is used of
torchvision here never calls them. With a CUDA build of torch nothing is done.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

import torch


class _Declarer(importlib.abc.MetaPathFinder):
    """Declares the schemas at the moment torchvision is first imported, and finds nothing."""

    library: torch.library.Library | None = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == "torchvision" and _Declarer.library is None:
            library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
            for name in ("nms", "qnms"):
                library.define(  # type: ignore[no-untyped-call]
                    f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )
            _Declarer.library = library
        return None


_declarer = _Declarer()


def ensure_torchvision() -> None:
    """Make a later `import torchvision` work; call it before importing streaming."""
    if torch.version.cuda is None and _declarer not in sys.meta_path:
        sys.meta_path.insert(0, _declarer)
