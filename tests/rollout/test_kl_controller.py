"""The coefficient of the KL to the reference."""

from __future__ import annotations

import math

import pytest

from src.errors import SettingError
from src.rollout.kl_controller import AdaptiveKL, DoublingKL, FixedKL


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (6.0, 1.0),
        (6.6, 1 + 0.1 * 50 / 1000),
        (5.4, 1 - 0.1 * 50 / 1000),
        (600.0, 1 + 0.2 * 50 / 1000),
        (0.0, 1 - 0.2 * 50 / 1000),
        (-3.0, 1 - 0.2 * 50 / 1000),
    ],
)
def test_the_coefficient_moves_by_the_clipped_relative_error(kl: float, factor: float) -> None:
    """Checklist 32. beta (1 + clip(KL / target - 1, +-0.2) n / horizon), by hand."""
    controller = AdaptiveKL(0.3, kl_target=6.0, kl_horizon=1000)
    controller.update(kl, episodes=50)
    assert controller.kl_coef == pytest.approx(0.3 * factor, rel=1e-12)


def test_the_coefficient_never_turns_into_a_reward_for_drifting() -> None:
    """Checklist 32. With more than five horizons of episodes at once the formula alone would change its sign."""
    controller = AdaptiveKL(0.3, kl_target=6.0, kl_horizon=10)
    controller.update(0.0, episodes=64)
    assert controller.kl_coef >= 0


@pytest.mark.parametrize(
    ("settings", "name"),
    [((0.1, 0.0, 10), "kl_target"), ((0.1, -1.0, 10), "kl_target"), ((0.1, 6.0, 0), "kl_horizon"),
     ((0.1, 6.0, -5), "kl_horizon"), ((0.0, 6.0, 10), "kl_coef")],
)  # fmt: skip
def test_settings_that_cannot_steer_are_refused(settings: tuple[float, float, int], name: str) -> None:
    """Checklist 32."""
    with pytest.raises(SettingError, match=name):
        AdaptiveKL(*settings)


def test_the_coefficient_survives_a_checkpoint() -> None:
    """Checklist 32, 61."""
    one, two = AdaptiveKL(0.3, 6.0, 1000), AdaptiveKL(0.3, 6.0, 1000)
    one.update(60.0, 50)
    two.load_state_dict(one.state_dict())
    assert two.kl_coef == one.kl_coef != 0.3


def test_a_fixed_coefficient_stays_and_must_not_be_negative() -> None:
    """Checklist 32."""
    controller = FixedKL(0.3)
    controller.update(600.0, 50)
    controller.load_state_dict(controller.state_dict())
    assert controller.kl_coef == 0.3
    with pytest.raises(SettingError, match="kl_coef"):
        FixedKL(-0.1)


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (0.012, 1.0),  # 1.5 times the target exactly
        (math.nextafter(0.012, 1.0), 2.0),
        (0.8, 2.0),  # never more than twice at once
        (0.008, 1.0),
        (0.008 / 1.5, 1.0),  # the target / 1.5 exactly
        (math.nextafter(0.008 / 1.5, 0.0), 0.5),
        (0.0, 0.5),
        (-0.1, 0.5),  # the estimate k1 may come out negative
    ],
)
@pytest.mark.parametrize("episodes", [1, 512])
def test_the_coefficient_doubles_and_halves_at_1_5_times_the_target(kl: float, factor: float, episodes: int) -> None:
    """Checklist 57. Beyond the bounds, not at them; how many episodes there were is no matter."""
    controller = DoublingKL(0.3, kl_target=0.008)
    controller.update(kl, episodes)
    assert controller.kl_coef == 0.3 * factor


def test_doublings_and_halvings_cancel() -> None:
    """Checklist 57. Twice up and twice down is where it was, exactly."""
    controller = DoublingKL(0.3, kl_target=0.01)
    for kl in (1.0, 1.0, 0.001, 0.01, 0.001):
        controller.update(kl, 8)
    assert controller.kl_coef == 0.3


def test_the_doubled_coefficient_survives_a_checkpoint() -> None:
    """Checklist 57 and 61."""
    one, two = DoublingKL(0.3, 0.01), DoublingKL(0.3, 0.01)
    one.update(1.0, 8)
    two.load_state_dict(one.state_dict())
    assert two.kl_coef == one.kl_coef == 0.6
    two.update(0.0, 8)
    assert two.kl_coef == 0.3


@pytest.mark.parametrize(
    ("settings", "name"),
    [((0.0, 0.01), "kl_coef"), ((-1.0, 0.01), "kl_coef"), ((0.3, 0.0), "kl_target"), ((0.3, -0.01), "kl_target")],
)
def test_settings_that_cannot_double_are_refused(settings: tuple[float, float], name: str) -> None:
    """Checklist 57. A coefficient of 0 would stay 0 for ever."""
    with pytest.raises(SettingError, match=name):
        DoublingKL(*settings)
