"""The device that a command works on."""

from __future__ import annotations

import torch

from trainer.schema import ConfigError


def usable_device(name: str) -> torch.device:
    """Return the device of a name, once it has held a number and given it back.

    Args:
        name: A device of torch; "auto" takes a GPU when there is one.

    Raises:
        ConfigError: If torch knows no such device, or cannot use it here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    # Builds of torch without a kind of device fail an assertion, or an import of their own.
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ConfigError(
            f"device={name} cannot be used here ({reason}); set device=cpu, or device=auto to take "
            "a GPU when there is one"
        ) from error
    return device
