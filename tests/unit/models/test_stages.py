import pytest

from models.flow.stages import Segment, Stages, StagesError, default_critical_times


def test_defaults_are_the_papers() -> None:
    assert default_critical_times(1) == ()
    assert default_critical_times(2) == (0.5,)
    assert default_critical_times(3) == (0.67, 0.33)
    assert default_critical_times(4) == (0.75, 0.5, 0.25)


def test_scales_enter_coarse_to_fine() -> None:
    stages = Stages((0.67, 0.33))
    assert stages.scales == 3
    assert stages.activation_times == (0.0, 0.33, 0.67)
    assert stages.segments == (
        Segment(start=0.0, end=0.33, active=1),
        Segment(start=0.33, end=0.67, active=2),
        Segment(start=0.67, end=1.0, active=3),
    )


def test_one_scale_has_one_segment() -> None:
    assert Stages(()).segments == (Segment(start=0.0, end=1.0, active=1),)


@pytest.mark.parametrize(
    "times", [(0.3, 0.6), (0.5, 0.5), (1.0,), (0.0,), (1.5,), (-0.1,), (float("nan"),)]
)
def test_times_that_do_not_cut_the_axis_are_refused(times: tuple[float, ...]) -> None:
    with pytest.raises(StagesError, match="decrease strictly"):
        Stages(times)


def test_no_scales_are_refused() -> None:
    with pytest.raises(StagesError, match="scales=0"):
        default_critical_times(0)
