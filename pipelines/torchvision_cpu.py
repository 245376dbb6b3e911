"""Let torchvision, which streaming imports, load beside a torch without CUDA.

PyPI's torchvision is a CUDA build whose compiled operators cannot load there, and its import stops
at the missing operator `nms`. Declaring the two schemas is enough: what is used of torchvision here
never calls them. Where torchvision loads as it is, nothing is done.
"""

import torch

_declared: list[torch.library.Library] = []  # an operator is gone when its library object is


def ensure_torchvision() -> None:
    """Import torchvision; call it before importing streaming.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: It cannot be loaded for another reason.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if _declared or "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            library.define(  # type: ignore[no-untyped-call]
                f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
        _declared.append(library)
        import torchvision  # noqa: F401
