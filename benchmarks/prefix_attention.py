"""Prefix attention against one masked call over all tokens, and against FlexAttention."""

import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import command
from benchmarks.interleaved import interleave, stopwatch_of
from models.transformer.attention import prefix_attention

_TOKENS = {256: (64, 256), 512: (64, 256, 1024), 1024: (256, 1024, 4096)}
_DESCRIPTION = """\
Block-causal attention over scales at the token counts of 256, 512 and 1024 pixel images, all scales
active, with the heads of a B model. `masked` gets its tokens joined beforehand, which no network
with separate weights has; `joined` joins them itself. Masks are made beforehand. `kept` is what the
backward pass needs (all tensors that autograd saves), `peak` the peak of CUDA memory above the
inputs. FlexAttention is measured on a GPU alone, where it has fast kernels.

  python -m benchmarks.prefix_attention
  python -m benchmarks.prefix_attention --pixels 1024 --batch 8 --precision bf16 --device cuda"""

Attend = Callable[[], tuple[Tensor, ...]]


class Attention:
    """Inputs of one attention layer, and the ways to carry it out.

    Args:
        tokens: Tokens of each scale, coarse to fine.
        batch: Images.
        heads: Attention heads.
        head_width: Width of one head.
        device: Where to run.
        dtype: Precision.
    """

    def __init__(
        self,
        tokens: tuple[int, ...],
        *,
        batch: int,
        heads: int,
        head_width: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)
        # Laid out as a network's projections leave them: queries, keys and values side by side.
        self.scales = [
            torch.randn(
                batch, n, 3, heads, head_width, generator=generator, device=device, dtype=dtype
            ).requires_grad_()
            for n in tokens
        ]
        self.joined = torch.cat(self.scales, dim=1).detach().requires_grad_()
        owner = torch.repeat_interleave(torch.tensor(tokens, device=device))
        self.owner = owner
        self.mask = owner[:, None] >= owner[None, :]
        self.gradient = torch.randn(
            batch, sum(tokens), heads * head_width, generator=generator, device=device, dtype=dtype
        )
        self.tokens = tokens

    def prefix(self) -> tuple[Tensor, ...]:
        """One call for each scale, without a mask."""
        queries, keys, values = zip(*(scale.unbind(2) for scale in self.scales), strict=True)
        return prefix_attention(queries, keys, values)

    def masked(self) -> tuple[Tensor, ...]:
        """One call with a dense mask over tokens that are joined already."""
        return self._attend_masked(self.joined)

    def joining(self) -> tuple[Tensor, ...]:
        """Join the tokens of all scales, then one call with a dense mask."""
        return self._attend_masked(torch.cat(self.scales, dim=1))

    def _attend_masked(self, tokens: Tensor) -> tuple[Tensor, ...]:
        query, key, value = (part.transpose(1, 2) for part in tokens.unbind(2))
        gathered = F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask)
        return torch.split(gathered.transpose(1, 2).flatten(2), list(self.tokens), dim=1)

    def flex(self) -> Attend:
        """Compile FlexAttention with a block mask; its sparse blocks skip what the mask hides."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        total, owner = sum(self.tokens), self.owner

        def is_seen(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return owner[query] >= owner[key]

        blocks = create_block_mask(is_seen, None, None, total, total, device=str(owner.device))
        compiled = torch.compile(flex_attention, dynamic=False)

        def attend() -> tuple[Tensor, ...]:
            query, key, value = (part.transpose(1, 2) for part in self.joined.unbind(2))
            gathered = compiled(query, key, value, block_mask=blocks)
            return torch.split(gathered.transpose(1, 2).flatten(2), list(self.tokens), dim=1)

        return attend

    def with_backward(self, attend: Attend) -> Callable[[], None]:
        """Follow a way of attending by its backward pass."""
        gradients = torch.split(self.gradient, list(self.tokens), dim=1)

        def work() -> None:
            for leaf in (*self.scales, self.joined):
                leaf.grad = None
            torch.autograd.backward(attend(), gradients)

        return work


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = command.parser("prefix_attention", description=_DESCRIPTION, rounds=9)
    parser.add_argument("--pixels", type=command.whole_numbers, default=tuple(_TOKENS))
    parser.add_argument("--batch", type=command.positive, default=2)
    parser.add_argument("--heads", type=command.positive, default=12)
    parser.add_argument("--head-width", type=command.positive, default=64)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    options = parser.parse_args(arguments)
    if unknown := set(options.pixels) - set(_TOKENS):
        parser.error(f"--pixels {sorted(unknown)} are unknown; there are {list(_TOKENS)}")
    setting = command.setting("prefix_attention", options)
    for pixels in options.pixels:
        attention = Attention(
            _TOKENS[pixels],
            batch=options.batch,
            heads=options.heads,
            head_width=options.head_width,
            device=setting.device,
            dtype=torch.bfloat16 if options.precision == "bf16" else torch.float32,
        )
        ways: dict[str, Attend] = {
            "masked": attention.masked,
            "joined": attention.joining,
            "prefix": attention.prefix,
        }
        if setting.device.type == "cuda":
            ways["flex"] = attention.flex()
        for direction in ("forward", "forward+backward"):
            backward = direction != "forward"
            works = {
                name: attention.with_backward(way) if backward else torch.no_grad()(way)
                for name, way in ways.items()
            }
            timings = interleave(
                works, rounds=options.rounds, stopwatch=stopwatch_of(setting.device)
            )
            for timing in timings:
                setting.report.add(
                    pixels=pixels,
                    tokens="+".join(map(str, attention.tokens)),
                    direction=direction,
                    way=timing.name,
                    minimum_ms=1000 * timing.minimum,
                    spread=timing.spread,
                    ratio=timing.ratio,
                    kept_mib=_mib(kept_bytes(ways[timing.name])) if backward else None,
                    peak_mib=_peak_mib(works[timing.name], setting.device),
                )
    setting.deliver()
    if setting.device.type != "cuda":
        print("\nFlexAttention and peak memory: not measured, there is no CUDA device.")
    return 0


def kept_bytes(forward: Callable[[], object]) -> int:
    """Sum the storages that a forward pass saves for its backward pass, each once.

    Inputs that are saved count too, so a forward pass that saves nothing but its inputs keeps
    exactly their size.

    Args:
        forward: Forward pass; gradients must be enabled.
    """
    storages: dict[int, int] = {}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        # Held until the end, or a later tensor could get the same address.
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storages.values())


def _peak_mib(work: Callable[[], object], device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return _mib(torch.cuda.max_memory_allocated() - before)


def _mib(count: int) -> float:
    return count / 2**20


if __name__ == "__main__":
    sys.exit(command.run_guarded(main))
