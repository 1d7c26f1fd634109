"""bench grpo's clock: when is an accuracy reached?"""
from types import SimpleNamespace

import pytest

from bench.grpo import Race


def finish(looks, target):
    rest = iter(looks)
    race = Race(SimpleNamespace(minutes=1.0, every=2.0), lambda model: next(rest), target, 0.40)
    while race.add(1.0, None):
        pass
    return race


def test_one_lucky_look_reaches_nothing():
    """A look is 200 problems, so +-2 points: the first look above the target used to end a race, and
    the side that looked more often had more chances."""
    race = finish([0.62, 0.50, 0.61, 0.66], 0.60)
    assert [a for _, a in race.curve] == [0.40, 0.62, 0.50, 0.61, 0.66]
    # the mean of the last two is 0.635 at 7 seconds, the one before 0.555 at 5
    assert race.reached == pytest.approx(5 + 2 * (0.60 - 0.555) / (0.635 - 0.555))


def test_a_target_that_is_never_reached_ends_with_the_minutes():
    race = finish([0.5] * 40, 0.60)
    assert race.reached is None and race.seconds == 61
