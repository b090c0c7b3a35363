"""Computed sentences: each figure in them is one that was handed in; foreign text is escaped."""

from __future__ import annotations

from types import SimpleNamespace

import polars as pl
import pytest

from core.view import describe
from core.view.guide import COLUMNS, WORDS, extract_command, markdown_safe, neuronpedia_url

REPLICATION = SimpleNamespace(
    n_raised=50, n_suppressed=40, n_raised_replicated=31, n_suppressed_replicated=29, n_replicated=60, n_carried=90,
    n_prompts_discovery=161, n_prompts_confirmation=159, permuted_mean=0.35, permuted_ci95=(0.0, 2.0),
    n_permutations=20,
)


def ranking(target: float, reference: float) -> SimpleNamespace:
    return SimpleNamespace(n_target=10, n_reference=12, target="bad", reference="good", n_prompts=11, paired=False,
                           mean_length_target=target, mean_length_reference=reference,
                           length_ratio=target / reference if reference else float("nan"))


def table() -> pl.DataFrame:
    return pl.DataFrame({
        "feature": [1, 2, 3, 4], "name": ["a_b", "<b>", "c", "d"], "label": ["Doctor", "", "", ""],
        "tokens": ["x", "tablet", "a.b", "d"], "fires_on": ["", "", "", "your nurse"],
        "effect_size": [2.0, -3.0, 0.1, None],
        "q_value": [1e-9, 1e-3, 0.8, None],
        "rank": [1, 3, 2, None], "direction": ["raised", "suppressed", "not significant", "not significant"],
    })


def test_replication_gives_both_ends_and_the_control() -> None:
    words = describe.replication(REPLICATION)
    assert "50 most raised and 40 most suppressed" in words and "**31** and **29**" in words
    assert "(161)" in words and "(159)" in words
    assert "0.3 of 90" in words or "0.4 of 90" in words
    assert "0 to 2, 20 shuffles" in words
    assert "being computed" in describe.replication(REPLICATION, waiting=True)
    assert describe.held_out(REPLICATION) == "60 of 90" and describe.held_out(None) == "none"


@pytest.mark.parametrize(("lengths", "words"), [
    ((66.0, 60.0), "10.0% longer than"), ((54.0, 60.0), "10.0% shorter than"), ((60.1, 60.0), "as long as"),
])
def test_the_length_difference_is_said_with_its_sign(lengths: tuple[float, float], words: str) -> None:
    said = describe.sample(ranking(*lengths))
    assert words in said and f"{lengths[0]:.1f} against" in said and "11 prompts, unpaired" in said


def test_no_length_no_claim() -> None:
    assert "average" not in describe.sample(ranking(10.0, 0.0))


def test_filters_take_side_words_and_numbers() -> None:
    def pick(find: str = "", tail: str = "both", passing: bool = False) -> list[int]:
        return describe.filtered(table(), find=find, tail=tail, passing=passing)["feature"].to_list()

    assert pick() == [1, 2, 3, 4]
    assert pick(tail="raised") == [1, 3] and pick(tail="suppressed") == [2]
    assert pick(passing=True) == [1, 2]
    assert pick(find="DOCTOR") == [1] and pick(find="tab") == [2] and pick(find="3") == [3]
    assert pick(find="NURSE") == [4]
    assert pick(find="a.b") == [3] and pick(find=".*") == []  # text, not a pattern


def test_one_line_escapes_the_name() -> None:
    assert r"a\_b" in describe.one_line(table(), 1) and r"\<b\>" in describe.one_line(table(), 2)
    assert "not tested" in describe.one_line(table(), 4) and "99" in describe.one_line(table(), 99)


def test_zeros_are_said_a_side() -> None:
    values = pl.DataFrame({"side": ["bad"] * 4 + ["good"], "activation": [0.0, 0.0, 0.0, 2.0, 1.0]})
    said = describe.zeros(values, ("bad", "good"))
    assert "Bad: 75% of 4" in said and "good: 0% of 1" in said


def test_depth_names_the_best_layers_or_says_there_are_none() -> None:
    rows = pl.DataFrame({"layer": [3, 9], "n_raised": [1, 5], "n_suppressed": [0, 2], "resid_auroc": [0.9, 0.6]})
    said = describe.depth(rows)
    assert "layer **9** (5 raised, 2 suppressed)" in said and "layer **3** (held-out AUROC 0.90)" in said
    none = rows.with_columns(pl.lit(None, dtype=pl.Int64).alias(c) for c in ("n_raised", "n_suppressed", "resid_auroc"))
    assert "No cached layer" in describe.depth(none)


def test_every_heading_has_an_explanation() -> None:
    assert all(word in WORDS for _, word in COLUMNS.values())
    assert all(len(text) > 20 and text.endswith(".") for text in WORDS.values())


def test_commands_and_links() -> None:
    assert extract_command("demo") == "python -m core extract demo"
    assert extract_command("p", "bad", "x") == "python -m core extract p --variant bad --conversations x"
    assert neuronpedia_url("gemma-2-9b-it/20-res 16k", 5) == "https://www.neuronpedia.org/gemma-2-9b-it/20-res%2016k/5"
    assert markdown_safe("a_b [c](d)\n$x$") == r"a\_b \[c\]\(d\) \$x\$"
