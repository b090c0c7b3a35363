"""The desk: mute, solo and parts that sum to the whole; the panes that each way of comparing asks for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from core.conversations import Message
from core.directions import Direction
from core.steering_plan import Hold, Push, at_random, scaled
from core.view import steering_desk as desk
from core.view.steering_desk import Asked, Channel
from core.view.steering_parts import feature_numbers, raw_words


def made(name: str = "d", seed: int = 0, layer: int = 3) -> Direction:
    return Direction(name, "m", layer, np.random.default_rng(seed).standard_normal(16), 5.0)


CHANNELS = [Channel(key, key, made(key, n)) for n, key in enumerate("abc")]
STRENGTHS = {"a": 0.2, "b": -0.1, "c": 0.0}


@pytest.mark.parametrize(("marks", "heard"), [
    ({}, ["a", "b"]),
    ({"a": ["M"]}, ["b"]),
    ({"b": ["S"]}, ["b"]),
    ({"a": ["S"], "b": ["S"]}, ["a", "b"]),
    ({"a": ["S", "M"]}, []),
    ({"c": ["S"]}, []),
])  # fmt: skip
def test_mute_and_solo(marks: dict, heard: list[str]) -> None:
    assert desk.sounding(STRENGTHS, marks) == heard
    pushes = desk.pushes(CHANNELS, STRENGTHS, marks)
    assert [(p.direction.name, p.strength) for p in pushes] == [(key, STRENGTHS[key]) for key in heard]


def test_a_spread_direction_pushes_as_the_whole() -> None:
    whole = made("whole", 7)
    first = 0.3 * made("x", 8).vector
    parts = [Channel("x", "x", Direction("x", "m", 3, first, 5.0)),
             Channel("rest", "rest", Direction("rest", "m", 3, whole.vector - first, 5.0))]
    strengths = desk.spread(whole, parts, -0.25)
    added = np.sum([p.vector for p in desk.pushes(parts, strengths, {})], axis=0)
    assert np.allclose(added, Push(whole, -0.25).vector, atol=1e-5)


def test_strengths_are_ordered_and_always_have_their_unsteered_pane() -> None:
    panes = desk.strengths(Asked("Why?", (Push(made(), 0.2),), (Hold(3, 1, 4.0),)), [1.0, -1.0])
    assert [p.name for p in panes] == ["Reversed", "Unsteered", "Steered"]
    assert [[q.strength for q in p.pushes] for p in panes] == [[-0.2], [], [0.2]]
    assert [p.beside for p in panes] == [1, None, 1] and not panes[1].steered
    assert [len(p.holds) for p in panes] == [0, 0, 1], "a held feature has no reverse"
    assert {p.seed for p in panes} == {0}, "the same dice"


def test_variants_and_seeds_compare_with_the_same_weights_and_dice() -> None:
    asked = Asked("Why?", (Push(made(), 0.2),), lora=0.5, seed=3)
    for panes in (desk.variants(asked, "bad"), desk.seeds(asked, 3)):
        for pane in panes:
            beside = panes[pane.beside] if pane.beside is not None else None
            assert pane.steered == (beside is not None)
            if beside is not None:
                assert (beside.variant, beside.lora, beside.seed) == (pane.variant, pane.lora, pane.seed)
    assert [p.seed for p in desk.seeds(asked, 3)] == [3, 4, 5] * 2
    assert [p.variant for p in desk.variants(asked, "bad")] == ["base", "base", "bad", "bad"]


def test_the_control_is_as_long_as_the_sum_and_points_elsewhere() -> None:
    pushes = (Push(made("x", 1), 0.3), Push(made("y", 2), -0.2))
    total = np.sum([p.vector for p in pushes], axis=0)
    (control,) = at_random(pushes, 5)
    assert np.linalg.norm(control.vector) == pytest.approx(np.linalg.norm(total), rel=1e-5)
    assert abs(control.direction.cosine(total)) < 0.6
    assert np.array_equal(control.vector, at_random(pushes, 5)[0].vector)
    assert not np.allclose(control.vector, at_random(pushes, 6)[0].vector)
    other = Push(made("z", 3, layer=9), 0.1)
    assert [p.direction.layer for p in at_random((*pushes, other), 5)] == [3, 9]
    assert at_random((Push(made("x", 1), 0.3), Push(made("x", 1), -0.3)), 0) == ()
    assert scaled(pushes, 0) == ()


def test_each_pane_goes_on_with_its_own_conversation() -> None:
    asked = Asked("And then?", (Push(made(), 0.2),))
    before = desk.strengths(Asked("Why?", (Push(made(), 0.2),)), [1.0])
    panes = desk.followed(desk.strengths(asked, [1.0]), [(before[0], "Because."), (before[1], " ")])
    question = Message("user", "And then?")
    assert panes[0].messages == (Message("user", "Why?"), Message("assistant", "Because."), question)
    assert panes[1].messages == (question,), "nothing was said, so it begins anew"


def test_words_of_a_pane_and_of_a_strength() -> None:
    pane = desk.strengths(Asked("Why?", (Push(made("data"), 0.2),), variant="bad", lora=0.5), [-1.0])[0]
    assert desk.what(pane) == "bad at 0.5 · \N{MINUS SIGN}0.2 data"
    part = replace(made("475: your doctor"), origin={"feature": "475"})
    pane = desk.strengths(Asked("Why?", (Push(part, 0.2),)), [1.0])[1]
    assert desk.what(pane) == "base · +0.2 feature 475"
    d = made()
    assert raw_words(d, 0.2).startswith("+1 raw") and f"{1 / d.norm:+.3g} times" in raw_words(d, 0.2)


def test_features_by_number_say_what_they_could_not_read() -> None:
    assert feature_numbers("475, 718 475;3", 1000) == ([475, 718, 3], "")
    found, said = feature_numbers("475, 4000, x<b>", 1000)
    assert found == [475] and "4000, x<b>" in said
    assert len(feature_numbers("1,2,3,4,5,6,7,8", 10)[0]) == 6
