"""A direction's algebra, its units, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from core.directions import Direction, cosine, random_like
from core.errors import DirectionError


def make(vector: list[float], name: str = "d", layer: int = 3, norm: float | None = 10.0) -> Direction:
    return Direction(name, "tiny", layer, np.array(vector), norm)


def test_adding_and_taking_away_gives_the_first_again() -> None:
    a, b = make([1.0, 2.0, -3.0]), make([0.5, -0.25, 4.0], "b")
    assert np.array_equal((a + b - b).vector, a.vector)
    assert (a - a).norm == 0
    assert np.array_equal((2 * a / 2).vector, a.vector)
    assert np.array_equal((-a).vector, -a.vector)
    assert (a + b).origin["made_of"] == "d + b"


def test_strength_is_in_mean_residual_norms() -> None:
    a = make([3.0, 4.0])
    assert a.norm == 5 and a.share_of_residual_norm == 0.5
    assert np.allclose(a.scaled_to(0.3), [1.8, 2.4])
    assert np.allclose(a.scaled_to(-0.3), [-1.8, -2.4])
    assert np.linalg.norm((7 * a).scaled_to(0.3)) == pytest.approx(3.0)


def test_random_control_is_as_long_and_repeats() -> None:
    a = make([3.0, 4.0, 0.0, 12.0])
    one = random_like(a, 1)
    assert one.norm == pytest.approx(a.norm, rel=1e-6)
    assert np.array_equal(one.vector, random_like(a, 1).vector)
    assert not np.array_equal(one.vector, random_like(a, 2).vector)
    assert (one.layer, one.resid_norm) == (a.layer, a.resid_norm)


def test_vector_is_the_directions_own() -> None:
    written = np.ones(3, dtype=np.float32)
    a = make(written)
    written[0] = 5
    assert a.vector[0] == 1
    with pytest.raises(ValueError):
        a.vector[0] = 2


@pytest.mark.parametrize(
    ("make_it", "says"),
    [
        (lambda: make([1.0, np.nan]), "holds nan at coordinate 1"),
        (lambda: Direction("d", "m", 0, np.ones((2, 2))), r"shape \[2, 2\]"),
        (lambda: make([1.0], layer=-1), "layer -1"),
        (lambda: make([1.0], norm=0.0), "mean residual norm of 0.0"),
        (lambda: make([0.0, 0.0]).unit, "points nowhere"),
        (lambda: make([1.0], norm=None).scaled_to(1.0), "give a raw strength"),
        (lambda: make([1.0]) + make([1.0], layer=4), "cannot be added"),
        (lambda: make([1.0]) + make([1.0, 2.0]), "d_model 1"),
        (lambda: make([1.0]).cosine(np.ones(2)), "d_model 1"),
    ],
)
def test_what_is_no_direction_is_refused_in_a_sentence(make_it, says: str) -> None:
    with pytest.raises(DirectionError, match=says):
        make_it()


def test_cosine() -> None:
    a = make([1.0, 0.0])
    assert a.cosine(make([1.0, 1.0], layer=9)) == pytest.approx(2**-0.5)
    assert np.isnan(cosine(np.zeros(2), np.ones(2)))
