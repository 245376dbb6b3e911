"""The average on its way through another memory is that of one `lerp_`, to the bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.ema import EmaConfig
from trainer.engine.ema import Lane, MovingAverage, MovingAverages, follow_in_chunks

SIZES = st.lists(st.integers(0, 300), min_size=1, max_size=4)


@given(
    sizes=SIZES,
    room=st.integers(1, 100),
    lanes=st.integers(1, 3),
    decay=st.floats(0, 1),
    updates=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_chunks_of_any_size_change_no_bit(sizes, room, lanes, decay, updates, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw() -> list[torch.Tensor]:
        return [torch.randn(size, generator=generator) for size in sizes]

    whole = draw()
    parts = [each.clone() for each in whole]
    # What a room held before must not be seen.
    queues = [Lane(torch.full((room,), float("nan")), None) for _ in range(lanes)]
    for _ in range(updates):
        weights = draw()
        before = [each.clone() for each in weights]
        follow_in_chunks(parts, weights, 1.0 - decay, lanes=queues)
        for average, weight in zip(whole, weights, strict=True):
            average.lerp_(weight, 1.0 - decay)
        assert all(map(torch.equal, parts, whole))
        assert all(map(torch.equal, weights, before))


@pytest.mark.parametrize("device", ["device", "host"])
def test_it_follows_and_is_lent_in_host_memory_whichever_device_is_set(device):
    weights = [torch.full((2, 3), 4.0, requires_grad=True), torch.tensor(8.0, requires_grad=True)]
    average = MovingAverage(weights, device=device)
    for _ in range(2):
        average.join()
        with torch.no_grad():
            for weight in weights:
                weight.mul_(2)
        average.follow(weights, decay=0.5)
    # 4, 6 = (4 + 8) / 2, 11 = (6 + 16) / 2; and twice as much.
    values, wanted = [torch.full((2, 3), 11.0), torch.tensor(22.0)], [16.0, 32.0]
    assert all(map(torch.equal, average.values, values))

    def fail_with_it() -> None:
        with average.set_aside(weights):
            average.copy_to(weights)
            assert all(map(torch.equal, weights, values))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_with_it()
    assert [weight.unique().item() for weight in weights] == wanted
    assert all(map(torch.equal, average.values, values))


def test_several_averages_are_those_that_each_would_be_alone():
    weights = [torch.linspace(-1, 1, 7), torch.tensor(2.0)]
    together = MovingAverages(weights, config=EmaConfig(decay=0.9, decays=(0.5, 0.9, 0.0)))
    alone = {"ema": 0.9, "ema_0.5": 0.5, "ema_0.0": 0.0}
    expected = {kind: MovingAverage(weights, device="device") for kind in alone}
    for update in range(3):
        together.join()
        for weight in weights:
            weight.mul_(update + 2).sub_(1)
        together.follow(weights, decays=(0.9, 0.5, 0.0))
        for kind, decay in alone.items():
            expected[kind].follow(weights, decay=decay)
    values = together.values()
    assert list(values) == ["ema", "ema_0.5", "ema_0.0"]
    for kind, average in expected.items():
        assert all(map(torch.equal, values[kind], average.values))
    assert all(map(torch.equal, values["ema_0.0"], weights))
    own = [weight.clone() for weight in weights]
    with together.set_aside(weights):
        together.copy_to(weights)
        assert all(map(torch.equal, weights, values["ema"]))
    assert all(map(torch.equal, weights, own))
    with pytest.raises(ValueError, match="zip"):
        together.follow(weights, decays=(0.9,))
