"""Matrix products with each scale's own weights against one dense product of the same rows."""

import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import command
from benchmarks.interleaved import interleave, stopwatch_of
from models.transformer.config import preset

_DESCRIPTION = """\
The products of a block (queries, keys and values; both halves of the MLP) at the widths of B/2 and
XL/2. `dense` multiplies all rows by one weight, `experts` each scale's rows by its own. The rows
are those of a training batch with its stages dealt out: every image carries the coarsest scale,
1 in K the finest. `efficiency` is dense time over the experts' time.

  python -m benchmarks.expert_matmul
  python -m benchmarks.expert_matmul --scales 3 --batch 96 --precision bf16 --device cuda"""


class Products:
    """One layer's products, with and without separate weights.

    Args:
        rows: Rows of each scale.
        inputs: Width before the product.
        outputs: Width after it.
        device: Where to run.
        dtype: Precision.
    """

    def __init__(
        self,
        rows: tuple[int, ...],
        *,
        inputs: int,
        outputs: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        self._pieces = [draw(n, inputs).requires_grad_() for n in rows]
        self._whole = draw(sum(rows), inputs).requires_grad_()
        self._weights = [draw(outputs, inputs).requires_grad_() for _ in rows]
        self._biases = [draw(outputs).requires_grad_() for _ in rows]
        self._gradients = [draw(n, outputs) for n in rows]
        self._whole_gradient = torch.cat(self._gradients)

    def dense(self) -> None:
        """Forward and backward with the first scale's weight for all rows."""
        self._forget()
        out = F.linear(self._whole, self._weights[0], self._biases[0])
        torch.autograd.backward([out], [self._whole_gradient])

    def experts(self) -> None:
        """Forward and backward with each scale's own weight."""
        self._forget()
        outs = [
            F.linear(piece, weight, bias)
            for piece, weight, bias in zip(self._pieces, self._weights, self._biases, strict=True)
        ]
        torch.autograd.backward(outs, self._gradients)

    def _forget(self) -> None:
        for leaf in (self._whole, *self._pieces, *self._weights, *self._biases):
            leaf.grad = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = command.parser("expert_matmul", description=_DESCRIPTION, rounds=9)
    parser.add_argument("--sizes", default="B/2,XL/2", help="presets; default B/2,XL/2")
    parser.add_argument("--scales", type=command.whole_numbers, default=(2, 3), metavar="K,K")
    parser.add_argument("--batch", type=command.positive, default=12)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    options = parser.parse_args(arguments)
    if any(options.batch % scales for scales in options.scales):
        parser.error(f"--batch {options.batch} must be a multiple of every K in {options.scales}")
    setting = command.setting("expert_matmul", options)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    for size in options.sizes.split(","):
        width = preset(size).width
        shapes = {
            "qkv": (width, 3 * width),
            "mlp hidden": (width, 4 * width),
            "mlp output": (4 * width, width),
        }
        for scales in options.scales:
            rows = tuple(
                4 ** (4 - k) * options.batch * (k + 1) // scales for k in reversed(range(scales))
            )
            for layer, (inputs, outputs) in shapes.items():
                products = Products(
                    rows, inputs=inputs, outputs=outputs, device=setting.device, dtype=dtype
                )
                works: dict[str, Callable[[], object]] = {
                    "dense": products.dense,
                    "experts": products.experts,
                }
                dense, experts = interleave(
                    works, rounds=options.rounds, stopwatch=stopwatch_of(setting.device)
                )
                setting.report.add(
                    size=size,
                    scales=scales,
                    rows="+".join(map(str, rows)),
                    layer=layer,
                    dense_ms=1000 * dense.minimum,
                    experts_ms=1000 * experts.minimum,
                    spread=max(dense.spread, experts.spread),
                    efficiency=dense.minimum / experts.minimum,
                )
    setting.deliver()
    return 0


if __name__ == "__main__":
    sys.exit(command.run_guarded(main))
