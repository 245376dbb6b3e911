from typing import cast

import pytest

from models.ema import EmaConfig, EmaConfigError, EmaDevice, ema_decay


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


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_so_are_those_of_further_averages(decay: float) -> None:
    with pytest.raises(EmaConfigError, match=r"decays=\[.*\] must lie in"):
        EmaConfig(decays=(0.999, decay))


def test_each_decay_has_one_average_and_that_of_decay_comes_first() -> None:
    config = EmaConfig(decays=(0.999, 0.9999, 0.5, 0.999))
    assert config.kinds == ("ema", "ema_0.999", "ema_0.5")
    assert config.decays_at(0) == (0.1, 0.1, 0.1)
    assert config.decays_at(80) == (0.9, 0.9, 0.5)
    assert config.decays_at(10**6) == (0.9999, 0.999, 0.5)
    assert EmaConfig().kinds == ("ema",)


@pytest.mark.usefixtures("without_type_checks")
def test_an_average_is_kept_in_a_place_that_there_is() -> None:
    with pytest.raises(EmaConfigError, match=r"device='disk'.*\['device', 'host'\]"):
        EmaConfig(device=cast(EmaDevice, "disk"))
