"""What settings may say of a codec; apart from it, so that reading them takes no torch."""

from typing import Literal

Posterior = Literal["sample", "mean"]
"""What is taken of the normal distribution that an encoder gives for an image."""
EncodePrecision = Literal["fp32", "bf16"]
"""What an encoder computes in."""
