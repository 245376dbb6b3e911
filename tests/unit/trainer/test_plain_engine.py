"""The engine of one device in bf16: what it computes with, and what it keeps in float32."""

import pytest
import torch

from cluster.placement import Placement
from tests.support.engine_worker import EMA, OPTIM, tiny_model
from trainer.engine.build import build_engine
from trainer.engine.flat import ALIGNMENT
from trainer.engine.plain import PlainEngine
from trainer.engine.protocol import EngineConfig

INPUTS = (
    (torch.ones(2, 1, 4, 4), torch.ones(1, 1, 8, 8)),
    torch.tensor([0.2, 0.7]),
    torch.tensor([0, 1]),
)


@pytest.fixture
def engine() -> PlainEngine:
    made = build_engine(
        tiny_model,
        config=EngineConfig(precision="bf16"),
        placement=Placement.of({}, scales=2),
        optim=OPTIM,
        ema=EMA,
        micro_batch=2,
        rank_batch=2,
        world_size=1,
        device=torch.device("cpu"),
    )
    assert isinstance(made, PlainEngine)
    return made


def train(engine: PlainEngine, *, by: float = 1.0) -> bool:
    """Apply one update, or skip it."""
    loss = sum(velocity.square().mean() for velocity in engine(*INPUTS))
    engine.backward(loss * by, last=True)
    return bool(engine.update(learning_rate=1e-2, ema_decays=EMA.decays_at(0)).applied)


def kept(engine: PlainEngine, kind: str) -> dict[str, torch.Tensor]:
    return {each.name: each.tensors[kind].clone() for each in engine.fragments()}


def is_rounded(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    """Tell whether a model computes with these weights, rounded to bf16."""
    return all(
        torch.equal(parameter.detach().flatten(), weights[name].bfloat16())
        for name, parameter in model.named_parameters()
    )


def test_the_model_computes_with_rounded_weights_and_lends_them(engine):
    begun = {name: value.detach().flatten() for name, value in tiny_model().named_parameters()}
    # Not rounded as the weights of the model are.
    assert all(map(torch.equal, kept(engine, "master").values(), begun.values()))
    assert all(train(engine) for _ in range(3))
    masters, average = kept(engine, "master"), kept(engine, "ema")
    with engine.ema_weights() as model:
        assert is_rounded(model, average)
    assert is_rounded(model, masters)
    with engine.initial_weights() as model:
        assert is_rounded(model, begun)
    assert is_rounded(model, masters)
    assert all(map(torch.equal, kept(engine, "master").values(), masters.values()))


def test_a_gradient_that_is_not_finite_changes_nothing(engine):
    assert train(engine)
    kinds = ("master", "exp_avg", "exp_avg_sq", "ema", "ema_0.5")
    before = {kind: kept(engine, kind) for kind in kinds}
    assert not train(engine, by=float("nan"))
    for kind in kinds:
        assert all(map(torch.equal, kept(engine, kind).values(), before[kind].values())), kind
    assert train(engine)
    assert not all(map(torch.equal, kept(engine, "master").values(), before["master"].values()))


def test_weights_that_were_loaded_are_computed_with(engine):
    for fragment in engine.fragments():
        fragment.tensors["master"].fill_(0.3)
    engine.load_fragments(5)
    with engine.initial_weights() as model:
        pass
    assert {float(p) for each in model.parameters() for p in each.flatten()} == {
        float(torch.tensor(0.3).bfloat16())
    }


def test_each_weight_begins_where_kernels_are_fast(engine):
    with engine.ema_weights() as model:
        starts = [parameter.storage_offset() for parameter in model.parameters()]
    assert len(set(starts)) == len(starts)
    assert not any(start % ALIGNMENT for start in starts)
