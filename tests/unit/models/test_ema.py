import pytest

from models.ema import EmaConfig, EmaConfigError, ema_decay


def test_the_ramp_rises_from_a_tenth_to_the_decay() -> None:
    decays = [ema_decay(n, decay=0.999, warmup=True) for n in range(20_000)]
    assert decays[0] == 0.1
    assert decays[90] == 91 / 100
    assert decays == sorted(decays)
    assert decays[-1] == 0.999


def test_without_warmup_the_decay_is_constant() -> None:
    assert {ema_decay(n, decay=0.99, warmup=False) for n in (0, 1, 10_000)} == {0.99}


@pytest.mark.parametrize("decay", [1.0, -0.1, 2.0, float("nan")])
def test_decays_that_never_learn_or_diverge_are_refused(decay: float) -> None:
    with pytest.raises(EmaConfigError, match="decay="):
        EmaConfig(decay=decay)
