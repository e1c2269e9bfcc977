"""What training would take wrongly is found, and what only looks like it is left alone."""

from __future__ import annotations

import numpy as np
import pytest

from xr0_engine.training.data.plausibility import (
    FEWEST_TICKS,
    Glance,
    hardly_moving,
    lying,
    several_sizes,
    turned,
    wraps,
)

TICKS = 2 * FEWEST_TICKS
COLUMNS = 4


def glance(actions=None, picture=None, columns=range(COLUMNS), size=(48, 64)):
    """Of an episode that moves in all columns, unless told otherwise."""
    actions = np.random.default_rng(0).normal(size=(TICKS, COLUMNS)) if actions is None else actions
    values = {}
    for column in columns:
        found, counts = np.unique(actions[:, column].astype(np.float32), return_counts=True)
        values[column] = float(found[counts.argmax()]), int(counts.max())
    mean = actions.mean(axis=0)
    return Glance(
        columns=np.isin(np.arange(COLUMNS), list(columns)),
        count=len(actions),
        mean=mean,
        squares=((actions - mean) ** 2).sum(axis=0),
        values=values,
        pictures={} if picture is None else {"base": picture},
        sizes={"base": size},
    )


def with_column(values, column=2):
    actions = np.random.default_rng(1).normal(size=(TICKS, COLUMNS))
    actions[:, column] = values
    return actions


@pytest.mark.parametrize(("turn", "unit"), [(2 * np.pi, "rad"), (360.0, "degrees")])
def test_an_angle_that_wraps_is_found_with_its_tick(turn, unit):
    angle = (np.linspace(0.3, 0.9, 50) * turn + turn / 2) % turn - turn / 2
    jump = int(np.abs(np.diff(angle)).argmax()) + 1
    (fault,) = wraps(angle[:, None], [0])
    assert fault.startswith(f"tick {jump}: action column 0 jumps by a turn")
    assert f" {unit}: " in fault
    assert not wraps(np.unwrap(angle, period=turn)[:, None], [0])


def test_an_angle_that_flickers_about_half_a_turn_wraps():
    angle = np.pi * np.where(np.arange(50) % 7 < 4, 1, -1)
    assert len(wraps(angle[:, None], [0])) == 1


@pytest.mark.parametrize(
    "path",
    [
        np.linspace(-3, 3, 50),
        np.tile([0.0, 1000.0], 25),
        np.tile([-1.0, 1.0], 25),
        np.random.default_rng(5).uniform(-5, 5, 200),
        np.random.default_rng(5).uniform(-3, 3, 200),
        np.repeat([0.0, 6.0, 0.0], 20),
        np.repeat([-3.2, 3.2, -3.2], 20),
    ],
    ids=["slow", "thousand", "signs", "steps in mm", "small steps in mm", "an opening of 6", "full speed"],
)
def test_what_moves_otherwise_is_no_wrap(path):
    assert not wraps(path[:, None], [0])


def test_noise_and_rare_values_are_found_in_their_column_only():
    noise = 2e-5 * np.random.default_rng(2).normal(size=TICKS)
    assert [fault.split(" has")[0] for fault in hardly_moving([glance(with_column(noise))])] == ["action column 2"]
    rare = np.where(np.arange(TICKS) == 5, 1.0, 0.0)
    (fault,) = hardly_moving([glance(with_column(rare))])
    assert fault.startswith(f"action column 2 is 0 at {TICKS - 1} of {TICKS} ticks")


@pytest.mark.parametrize(
    "values", [0.5, np.tile([-1.0, 1.0], TICKS // 2), np.where(np.arange(TICKS) < 0.9 * TICKS, 0.0, 1.0)]
)
def test_still_columns_and_grippers_are_no_fault(values):
    assert not hardly_moving([glance(with_column(values))])


def test_what_happens_once_in_every_episode_is_no_noise():
    release = np.where(np.arange(TICKS) < TICKS - 1, 0.0, 1.0)
    assert not hardly_moving([glance(with_column(release)) for _ in range(3)])
    in_one = [glance(with_column(release)), glance(with_column(0.0)), glance(with_column(0.0))]
    assert len(hardly_moving(in_one)) == 1
    assert not hardly_moving(in_one, two_valued={2})


def test_columns_are_judged_over_all_episodes():
    # Still in each, but not at the same place: together it moves.
    assert not hardly_moving([glance(with_column(0.0)), glance(with_column(1.0))])
    few = [glance(with_column(1e-5 * np.random.default_rng(3).normal(size=TICKS))) for _ in range(3)]
    assert len(hardly_moving(few)) == 1


def test_short_datasets_and_unknown_columns_are_not_judged():
    noise = with_column(2e-5 * np.random.default_rng(2).normal(size=TICKS))
    assert not hardly_moving([glance(noise[: FEWEST_TICKS - 1])])
    assert not hardly_moving([glance(noise, columns=(0, 1, 3))])


def test_the_episode_that_lies_upside_down_is_found():
    scene = np.linspace(0, 255, 256).reshape(16, 16).astype(np.float32)
    noisy = [scene + np.random.default_rng(seed).normal(0, 20, scene.shape) for seed in range(5)]
    pictures = [*noisy[:3], noisy[3][::-1, ::-1], noisy[4]]
    assert turned([glance(picture=picture) for picture in pictures]) == [{}, {}, {}, {"base": "upside down"}, {}]
    assert not any(turned([glance(picture=picture) for picture in (noisy[0], noisy[1][::-1, ::-1])]))


def test_as_many_upside_down_as_not_are_found():
    scene = np.linspace(0, 255, 256).reshape(16, 16).astype(np.float32)
    pictures = [scene if place % 2 == 0 else scene[::-1, ::-1] for place in range(6)]
    assert [len(found) for found in turned([glance(picture=picture) for picture in pictures])] == [0, 1] * 3


@pytest.mark.parametrize(
    ("change", "how"),
    [
        (lambda picture: picture[::-1, ::-1], "upside down"),
        (lambda picture: picture[::-1], "upside down and mirrored"),
        (lambda picture: np.rot90(picture, -1), "on their side"),
        (np.rot90, "on their other side"),
        (lambda picture: picture, None),
    ],
    ids=["turned", "mirrored", "quarter", "other quarter", "as it is"],
)
def test_how_a_picture_lies(change, how):
    picture = np.random.default_rng(6).uniform(0, 255, (16, 16))
    assert lying(change(picture), picture) == how


def test_an_episode_of_another_size_is_found():
    sizes = [(48, 64), (96, 128), (48, 64)]
    found = several_sizes([glance(size=size) for size in sizes])
    assert found == [{}, {"base": "128x96, most others' 64x48"}, {}]


def test_pictures_that_differ_are_not_upside_down():
    rng = np.random.default_rng(4)
    assert not any(turned([glance(picture=rng.uniform(0, 255, (16, 16))) for _ in range(8)]))
    assert not any(turned([glance(picture=np.full((16, 16), 7.0)) for _ in range(4)]))
