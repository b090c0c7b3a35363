"""The sentence, the lists and the JSON of a concordance carry its own figures."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from test_concordance import K, N, make_ranking, planted

from core.analysis.concordance import Concordance, ConcordanceSettings, concord
from core.analysis.concordance_report import concordance_summary, figure, listed, sentence, words_for
from core.specs import ContrastSpec, Side
from core.view.text import concordance_text


def spec(name: str, kind: str, title: str = "") -> ContrastSpec:
    return ContrastSpec(name, kind, Side("bad", "x"), Side("base", "x"), title)


WORDS = words_for([spec("data", "data"), spec("model", "model")])
THREE = words_for([spec("data", "data"), spec("model", "model"), spec("response", "response")])


def two(m: int = 14, control: int | None = 5, **settings) -> Concordance:
    a, b = planted(m)
    controls = {} if control is None else {"model": make_ranking(planted(control)[1])}
    return concord({"data": make_ranking(a), "model": make_ranking(b)}, controls, ConcordanceSettings(**settings))


def three() -> Concordance:
    a, b = planted(14)
    response = np.random.default_rng(3).uniform(-0.5, 0.5, N)
    response[:40] = 2 - np.arange(40) / 40
    response[500:510] = 1
    rankings = {"data": a, "model": b, "response": response}
    return concord({name: make_ranking(x) for name, x in rankings.items()})


def test_the_sentence_carries_the_figures() -> None:
    found = two()
    at = found.overlap_of(("data", "model"), "raised").at_k(K)
    low, high = at.stricter.ci95
    assert sentence(found, "raised", WORDS) == (
        "Of the 50 features most raised by the data, 14 are also among the 50 most raised in the model; "
        f"chance {at.stricter.expected:.1f}, 95% range {low:.0f} to {high:.0f}; benign control 5."
    )
    assert "Of the 50 features most suppressed by the data, 14 are" in sentence(found, "suppressed", WORDS)
    assert "Of the 20 features" in sentence(two(k=20), "raised", WORDS)


def test_the_sentence_quotes_the_stricter_chance() -> None:
    found = two(control=None)
    (one,) = (o for o in found.overlaps if o.tail == "raised")
    at = one.at_k(K)
    harder = replace(at, matched=replace(at.matched, expected=9.04, ci95=(5.0, 13.0)))
    told = replace(found, overlaps=(replace(one, at=(harder,)),))
    assert "chance 9.0, 95% range 5 to 13." in sentence(told, "raised", WORDS)
    easier = replace(at, matched=replace(at.matched, expected=0.0, ci95=(0.0, 0.0)))
    told = replace(found, overlaps=(replace(one, at=(easier,)),))
    assert f"chance {at.uniform.expected:.1f}," in sentence(told, "raised", WORDS)


@pytest.mark.parametrize(("m", "says"), [(0, "0 are also among"), (1, "1 is also among"), (50, "50 are also among")])
def test_the_sentence_changes_with_what_is_found(m: int, says: str) -> None:
    found = two(m, None)
    assert says in sentence(found, "raised", WORDS) and "control" not in sentence(found, "raised", WORDS)


def test_the_sentence_about_a_short_or_empty_end() -> None:
    a, b = planted(5)
    few = concord({"data": make_ranking(np.where(np.arange(N) < 8, a, -np.abs(a))), "model": make_ranking(b)})
    assert sentence(few, "raised", WORDS).startswith("Of the 8 features most raised by the data, ")
    none = concord({"data": make_ranking(-np.abs(a)), "model": make_ranking(b)})
    assert sentence(none, "raised", WORDS) == "No feature is raised by the data."


def test_the_sentence_of_three_gives_each_other_contrast_and_all() -> None:
    found = three()
    counts = {names: found.overlap_of(names, "raised").at_k(K).observed
              for names in (("data", "model"), ("data", "response"), ("data", "model", "response"))}
    said = sentence(found, "raised", THREE)
    assert said.startswith(f"Of the 50 features most raised by the data, {counts['data', 'model']} are also among "
                           "the 50 most raised in the model (chance ")
    assert f" and {counts['data', 'response']} are also among the 50 most raised in the responses (chance " in said
    assert f"; {counts['data', 'model', 'response']} are in all three (chance " in said
    assert list(counts.values()) == [14, 40, 4]


def test_a_subtracted_control_is_said_first_and_not_counted() -> None:
    said = sentence(two(subtract="mean"), "raised", WORDS)
    assert said.startswith("With the benign control taken off, of the 50 features") and "; benign control" not in said


def test_words_are_by_kind_where_kinds_differ_else_titles_else_names() -> None:
    assert (THREE["response"].short, THREE["response"].phrase) == ("responses", "in the responses")
    titled = words_for([spec("a", "model", "Rank 8"), spec("b", "model", "Rank 1")])
    assert (titled["a"].short, titled["b"].phrase) == ("Rank 8", "in “Rank 1”")
    same = words_for([spec("a", "model", "One"), spec("b", "model", "One")])
    assert (same["a"].short, same["b"].short) == ("a", "b")


@pytest.mark.parametrize(("value", "text"), [(14.26, "14.3"), (0.8, "0.8"), (0.094, "0.09"), (0.001, "below 0.01"),
                                             (0.0, "0.00"), (0.0996, "0.1")])
def test_figures_keep_what_can_be_read(value: float, text: str) -> None:
    assert figure(value) == text


def test_the_lists_part_the_top_k() -> None:
    found = three()
    names = found.names
    sizes = {}
    for within in ([n] for n in names):
        sizes[within[0]] = listed(found, "raised", within).height
    shared = listed(found, "raised", names)
    by_two = [listed(found, "raised", p) for p in (names[:2], names[1:], (names[0], names[2]))]
    assert shared.height == found.overlap_of(names, "raised").at_k(K).observed
    assert sum(sizes.values()) + 2 * sum(t.height for t in by_two) + 3 * shared.height == 3 * K
    assert shared["place"].to_list() == sorted(shared["place"].to_list())
    worst = shared.select([f"raised_{n}" for n in names]).max_horizontal().max()
    assert worst <= K


def test_summary_is_the_command_line_s_json() -> None:
    found = two()
    summary = concordance_summary(found, 4, words=WORDS, context=lambda name, feature: f"{name} {feature}",
                                  layers=[found])
    assert summary == json.loads(json.dumps(summary, allow_nan=False))
    assert {"contrasts", "layer", "spearman", "overlap_at_k", "shared", "exclusive", "sentence"} <= set(summary)
    at = {row["k"]: row for row in summary["overlap_at_k"]}
    assert list(at) == [10, 20, 50, 100, 200] and at[50]["observed"] == 14
    assert at[50]["expected"] == pytest.approx(K * K / N) and len(at[50]["ci95"]) == 2
    assert at[50]["controls"] == {"model": 5}
    assert summary["spearman"]["data|model"]["n"] == N
    raised = [row for row in summary["shared"] if row["tail"] == "raised"]
    assert len(raised) == 4 and {row["feature"] for row in raised} <= set(range(36, 50))
    assert raised[0]["context"] == f"data {raised[0]['feature']}"
    assert {row["feature"] for row in summary["exclusive"]["model"] if row["tail"] == "raised"} <= set(range(50, 86))
    assert summary["sentence"].startswith(sentence(found, "raised", WORDS)) and len(summary["by_layer"]) == 1


def test_json_of_three_has_pairs_and_no_nan() -> None:
    summary = concordance_summary(three(), 2)
    json.dumps(summary, allow_nan=False)
    assert list(summary["pairs"]) == list(summary["shared_by_two"]) == ["data|model", "data|response", "model|response"]
    assert set(summary["exclusive"]) == {"data", "model", "response"}


def test_the_terminal_s_text_has_the_same_figures() -> None:
    summary = concordance_summary(two(), 3, words=WORDS, layers=[two()])
    text = concordance_text(summary)
    assert text.endswith(summary["sentence"]) and "data|model: Spearman" in text and "model only" in text
    assert "layer 15: Spearman data|model" in text
    lines = [x for x in text.splitlines() if x.split()[:2] == ["50", "14"] and "model 5" in x]
    assert len(lines) == 2 and all(f"{K * K / N:.1f}" in line for line in lines)
    assert concordance_text(concordance_summary(three(), 1)).count("shared by") == 4
