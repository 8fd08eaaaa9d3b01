"""Schedules against DINO's numpy arrays, and durations in their units."""

import numpy as np
import pytest

from ssl_vit.config.types import Duration
from ssl_vit.methods.schedules import cosine, teacher_temperature


def textbook_cosine(start, end, total, warmup):
    """DINO's schedule as an array: a linspace from 0 to `start`, then the cosine in a loop over the steps left."""
    rising = np.linspace(0, start, warmup)
    left = total - warmup
    falling = [end + 0.5 * (start - end) * (1 + np.cos(np.pi * i / left)) for i in range(left)]
    return np.concatenate([rising, falling])


@pytest.mark.parametrize("total", [1, 2, 7, 100, 1001])
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 1])
@pytest.mark.parametrize(("start", "end"), [(5e-4, 1e-6), (0.04, 0.4), (0.996, 1.0), (0.3, 0.3)])
def test_cosine_equals_dinos_array(total, share, start, end):
    warmup = round(share * total)
    schedule = cosine(start, end, total, warmup)
    values = [schedule(step) for step in range(total)]
    np.testing.assert_allclose(values, textbook_cosine(start, end, total, warmup), rtol=1e-12, atol=1e-15)


def test_cosine_starts_and_ends_at_its_values():
    schedule = cosine(0.0005, 1e-6, 1000, 100)
    assert schedule(0) == 0
    assert schedule(99) == schedule(100) == 0.0005  # the peak stands twice: end of the rise, start of the cosine
    assert schedule(550) == pytest.approx((0.0005 + 1e-6) / 2)
    assert schedule(999) > 1e-6
    assert schedule(1000) == schedule(5000) == 1e-6
    momentum = cosine(0.996, 1.0, 125_100)
    assert momentum(0) == 0.996
    assert 1 - 1e-11 < momentum(125_099) < 1


def test_cosine_rejects_a_warmup_longer_than_the_run():
    with pytest.raises(ValueError, match="warm-up of 11 steps does not fit into a run of 10 steps"):
        cosine(1, 0, 10, 11)


@pytest.mark.parametrize(("warmup", "epochs"), [(0, 3), (1, 3), (2, 5), (30, 100), (50, 50)])
def test_teacher_temperature_equals_dinos_array(warmup, epochs):
    per_epoch = np.concatenate([np.linspace(0.04, 0.07, warmup), np.full(epochs - warmup, 0.07)])
    schedule = teacher_temperature(0.04, 0.07, warmup, steps_per_epoch=13)
    values = [schedule(step) for step in range(13 * epochs)]
    np.testing.assert_allclose(values, np.repeat(per_epoch, 13), rtol=1e-12)


@pytest.mark.parametrize(
    ("text", "steps", "written"),
    [
        ("100 steps", 100, "100 steps"),
        ("100steps", 100, "100 steps"),
        ("1step", 1, "1 steps"),
        ("0epochs", 0, "0 epochs"),
        ("1.5 epochs", 75, "1.5 epochs"),
        (".5epoch", 25, "0.5 epochs"),
        ("10%", 200, "10%"),
        ("2.5 %", 50, "2.5%"),
        ("100%", 2000, "100%"),
    ],
)
def test_duration_is_parsed_and_written(text, steps, written):
    duration = Duration.parse(text)
    assert duration.steps(steps_per_epoch=50, total_steps=2000) == steps
    assert str(duration) == written
    assert Duration.parse(written) == duration


@pytest.mark.parametrize(
    "text", ["", "10", "ten epochs", "-1epochs", "5 minutes", "1epochs 2steps", "10%%", "1e3steps"]
)
def test_duration_rejects_unknown_units(text):
    with pytest.raises(ValueError, match=r"100steps, 1\.5epochs or 10%"):
        Duration.parse(text)
