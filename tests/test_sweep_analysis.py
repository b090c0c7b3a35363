"""What a sweep says, on points whose truth is planted: effects, shares, the coherent range, files, words, charts."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from core.analysis import sweep as sweeps
from core.conversations import Message
from core.directions import Direction
from core.errors import CacheError
from core.steering_plan import Dice, Hold, Pane, Plan, Push
from core.store.sweep_file import Point, Sweep, Swept, read_sweep, sweep_file, write_sweep
from core.view import sweep_charts, sweep_text

N = 30
RNG = np.random.default_rng(0)
BASE = RNG.normal(-0.5, 0.3, N)
SLOPE = RNG.normal(2.0, 0.4, N)
"""Of the direction, nats per mean residual norm, prompt by prompt."""
STRENGTHS = (-0.3, -0.2, -0.1, 0.1, 0.2, 0.3)


def margins(values: np.ndarray) -> dict[str, tuple[float, ...]]:
    return {"held": tuple(np.round(values, 5).tolist())}


def answers(nats: float, repeated: float) -> tuple[Swept, ...]:
    return tuple(Swept(q, s, 40, nats + 0.01 * q, repeated, False) for q in range(4) for s in range(2))


def planted(nats=lambda s: 2.0 + abs(s), repeated=lambda s: 0.0) -> Sweep:
    points = [Point("unsteered", 5, margins=margins(BASE), answers=answers(nats(0), repeated(0))),
              Point("unsteered", 5, "bad", margins=margins(BASE + 0.4))]
    for s in STRENGTHS:
        points.append(Point("direction", 5, strength=s, margins=margins(BASE + s * SLOPE),
                            answers=answers(nats(s), repeated(s))))
        points += [Point("random", 5, strength=s, draw=d, margins=margins(BASE + 0.1 * s * (1 - 2 * d)))
                   for d in range(2)]
        points += [Point("components", 5, strength=s, k=20, margins=margins(BASE + 0.75 * s * SLOPE)),
                   Point("remainder", 5, strength=s, k=20, margins=margins(BASE + 0.25 * s * SLOPE))]
    points += [Point("ablate-everywhere", 5, "bad", margins=margins(BASE + 0.1)),
               Point("ablate-random", 5, "bad", margins=margins(BASE + 0.4 + RNG.normal(0, 0.01, N))),
               Point("ablate-everywhere", 5, margins=margins(BASE - 0.05))]
    spec = {"contrast": "data", "layers": [5], "pairs": {"held": [f"p{n}" for n in range(N)]}, "variant": "bad",
            "prompts": ["a", "b", "c", "d"]}
    return Sweep(spec, tuple(points))


def test_findings_are_what_was_planted() -> None:
    found = sweeps.findings(planted(), 5, "held")
    assert found.strength == 0.3
    assert found.direction.value == pytest.approx(0.6 * SLOPE.mean(), abs=1e-4)
    assert found.direction.low < found.direction.value < found.direction.high and found.direction.n == N
    half = 1.96 * (0.6 * SLOPE).std(ddof=1) / math.sqrt(N)
    assert found.direction.high - found.direction.low == pytest.approx(2 * half, rel=0.15), "as a normal interval"
    assert [r.value for r in found.randoms] == pytest.approx([0.06, -0.06], abs=1e-4)
    assert found.over_random.value == pytest.approx(found.direction.value, abs=1e-3)
    assert found.recovered[20].value == pytest.approx(0.75, abs=1e-3)
    assert found.left[20].value == pytest.approx(0.25, abs=1e-3)
    assert found.learnt.value == pytest.approx(0.4, abs=1e-4)
    assert found.restored["at every layer"].value == pytest.approx(0.75, abs=1e-3)
    assert found.restored["random 0 at every layer"].value == pytest.approx(0.0, abs=0.02)
    assert found.between["at every layer"].value == pytest.approx(1 - (0.1 + 0.05) / 0.4, abs=1e-3)
    assert found.base_ablated["at every layer"].value == pytest.approx(-0.05, abs=1e-4)


def test_curves_hold_every_series_and_nothing_at_strength_0() -> None:
    table = sweeps.curves(planted(), 5, "held")
    assert table["series"].unique(maintain_order=True).to_list() == ["direction", "random", "20 best features",
                                                                     "without its 20 best"]
    assert table.filter(table["strength"] == 0)["shift"].to_list() == [0.0] * 4
    one = table.filter((table["series"] == "direction") & (table["strength"] == 0.2)).row(0, named=True)
    assert one["shift"] == pytest.approx(0.2 * SLOPE.mean(), abs=1e-4) and one["low"] < one["shift"] < one["high"]
    random = table.filter((table["series"] == "random") & (table["strength"] == 0.2))
    assert random["shift"].item() == pytest.approx(0.0, abs=1e-4), "the mean of both draws"


@pytest.mark.parametrize(("nats", "repeated", "ends"), [
    (lambda s: 2.0 + abs(s), lambda s: 0.0, (-0.3, 0.3)),
    (lambda s: 2.0 + (0.8 if s >= 0.2 else 0), lambda s: 0.0, (-0.3, 0.1)),
    (lambda s: 2.0, lambda s: 0.35 if s <= -0.2 else 0.1, (-0.1, 0.3)),
    (lambda s: 2.0, lambda s: 0.3 if s == -0.2 else 0.0, (-0.1, 0.3)),
    (lambda s: 2.0 + (9 if s else 0), lambda s: 0.0, (0.0, 0.0)),
])  # fmt: skip
def test_the_coherent_range_ends_at_the_first_strength_that_is_not(nats, repeated, ends: tuple[float, float]) -> None:
    sweep = planted(nats, repeated)
    assert sweeps.coherent_range(sweep, 5) == ends
    assert sweeps.findings(sweep, 5, "held").strength == (min(-ends[0], ends[1]) or 0.1)


def test_quality_is_by_question() -> None:
    table = sweeps.quality(planted(), 5)
    at = table.filter((table["series"] == "direction") & (table["strength"] == 0.0)).row(0, named=True)
    assert at["perplexity"] == pytest.approx(math.exp(2.015)) and at["n"] == 8
    assert at["perplexity_low"] < at["perplexity"] < at["perplexity_high"] and at["misaligned"] is None
    judged = replace(planted(), points=tuple(replace(p, n_misaligned=2) if p.answers else p for p in planted().points))
    assert sweeps.quality(judged, 5)["misaligned"].to_list()[0] == 0.25


def test_nothing_is_said_of_what_was_not_measured() -> None:
    sweep = planted()
    assert sweeps.coherent_range(sweep, 9) is None and sweeps.findings(sweep, 9, "held") is None
    assert sweeps.known_shift(sweep, 5, 0.12, "held") is None
    assert sweeps.known_shift(sweep, 5, 0.2, "held").value == pytest.approx(0.2 * SLOPE.mean(), abs=1e-4)
    bare = replace(sweep, points=tuple(p for p in sweep.points if p.kind in ("unsteered", "direction")))
    found = sweeps.findings(bare, 5, "held")
    assert found.over_random is None and found.recovered == {} and found.restored == {}
    assert len(sweep_text.finding_sentences(found, "bad")) == 1


def test_no_share_is_taken_of_what_is_not_there() -> None:
    noise = np.random.default_rng(3).normal(0, 0.2, N)
    points = tuple(replace(p, margins=margins(BASE + noise)) if (p.kind, p.variant) == ("unsteered", "bad") else p
                   for p in planted().points)
    found = sweeps.findings(replace(planted(), points=points), 5, "held")
    assert not sweeps.clear(found.learnt) and found.restored == found.between == {}
    assert "nothing to restore" in sweep_text.finding_sentences(found, "bad")[-1]
    assert sweeps.clear(sweeps.Figure(-1, -2, -0.5, 9)) and not sweeps.clear(sweeps.Figure(1, -0.1, 2, 9))


def test_the_file_reads_back_and_others_are_refused(tmp_path: Path) -> None:
    path = sweep_file(tmp_path, "data")
    sweep = planted()
    assert read_sweep(write_sweep(path, sweep)) == sweep
    path.write_text(path.read_text()[:-20])
    with pytest.raises(CacheError, match="cannot be read"):
        read_sweep(path)
    for text, wrong in (("{}", "no sweep"), ('{"format": "em-microscope-sweep", "format_version": 1}', "a point")):
        path.write_text(text)
        with pytest.raises(CacheError, match=wrong):
            read_sweep(path)
    with pytest.raises(CacheError, match="no such sweep"):
        read_sweep(tmp_path / "none.json")


def test_words_and_charts() -> None:
    sweep = planted()
    first, second, third = sweep_text.finding_sentences(sweeps.findings(sweep, 5, "held"), "bad-one")
    assert "more than random" in first and "+0.060 and -0.060" in first and "75%" in second and "75%" in third
    assert "bad\\-one" in third
    text = sweep_text.sweep_text({"file": "f", "n_points": 3, **sweeps.summary(sweep)})
    assert "coherent from -0.3 to +0.3" in text and "20 best features: 75%" in text and "ablated at every layer" in text
    drawn = sweep_charts.margin_curves(sweeps.curves(sweep, 5, "held"), (-0.3, 0.3)).to_dict()
    assert "nats per token" in str(drawn) and "Strength, mean residual norms" in str(drawn)
    for what in ("perplexity", "repeated"):
        sweep_charts.quality_curve(sweeps.quality(sweep, 5), what, None).to_dict()


def test_a_pane_is_known_only_where_it_is_a_measured_point() -> None:
    direction = Direction("data", "m", 5, np.ones(4), 8.0)
    pane = Pane("x", pushes=(Push(direction, 0.2),), messages=(Message("user", "Why?"),))
    plan = Plan("demo", (pane,), Dice())
    known = sweep_text.known_margin(pane, plan, planted())
    assert known == f"sweep: margin {0.2 * SLOPE.mean():+.2f} (n = 30)"
    others = [replace(pane, variant="bad"), replace(pane, pushes=(Push(direction, 0.25),)), replace(pane, pushes=()),
              replace(pane, holds=(Hold(5, 1, 1.0),)), replace(pane, pushes=(Push(direction, 0.2, raw=True),)),
              replace(pane, pushes=(Push(replace(direction, name="model"), 0.2),)),
              replace(pane, pushes=(Push(direction, 0.2), Push(direction, 0.1)))]
    assert all(sweep_text.known_margin(other, plan, planted()) == "" for other in others)
    assert sweep_text.known_margin(pane, replace(plan, scope="prompt"), planted()) == ""
    assert sweep_text.known_margin(pane, plan, None) == ""
