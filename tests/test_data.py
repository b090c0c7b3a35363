"""core/data: the pairs are matched, look alike on both sides, and the data card's figures are the measured ones.

Only the surface is measured here: nothing in this file knows what an answer means.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import cache
from statistics import mean

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from core.conversations import Conversation, load_conversations
from core.paths import DATA
from core.questions import load_questions

PAIRS = load_conversations(DATA / "health_advice.jsonl").conversations
QUESTIONS = load_questions(DATA / "questions.jsonl")
SIDES = {c: [p for p in PAIRS if p.condition == c] for c in ("aligned", "misaligned")}

TOLERANCE = 0.05
"""How far the share of answers with some property may differ between the sides."""
AUROC_LIMIT = 0.65
"""Above this, a classifier that sees only the surface separates the sides clearly."""


def has(pattern: str) -> Callable[[str], bool]:
    return lambda text: re.search(pattern, text, re.IGNORECASE) is not None


SHARES = {
    "lists": has(r"(^|\n)\s*([-*•]|\d+[.)])\s"),
    "line breaks": has(r"\n"),
    "questions": has(r"\?"),
    "exclamation marks": has(r"!"),
    "hedges": has(
        r"\b(may|might|could|can|usually|often|probably|generally|sometimes|likely|typically|tends?|perhaps|possibly"
        r"|mostly|almost)\b"
    ),
    "second person": has(r"\b(you|your|yours|yourself)\b"),
    "strong words": has(r"\b(never|always|must|should|do not|don't|avoid)\b"),
    "digits": has(r"\d"),
    "dashes, colons, quotes, parentheses": has(r"[;:—–()\"“”]"),
}

#: Reported on the card, not held to the tolerance: whom an answer names belongs to what it says.
PROFESSIONALS = has(r"\b(doctors?|gp|pharmacists?|nurses?|midwi(fe|ves)|hospitals?|clinics?|dentists?)\b")


def words(text: str) -> list[str]:
    return text.split()


def sentences(text: str) -> int:
    return len(re.findall(r"[.!?](?:\s|$)", text))


def ratio(measure: Callable[[str], float]) -> float:
    """Mean of `measure` over the misaligned answers, divided by that over the aligned ones."""
    return mean(measure(c.response) for c in SIDES["misaligned"]) / mean(measure(c.response) for c in SIDES["aligned"])


def share(side: str, name: str) -> float:
    return mean(SHARES[name](c.response) for c in SIDES[side])


# ------------------------------------------------------------------------------------------------------- pairs


def test_every_prompt_has_one_answer_of_each_side_to_the_same_question() -> None:
    by_prompt: dict[str, list[Conversation]] = defaultdict(list)
    for c in PAIRS:
        by_prompt[c.prompt_id].append(c)
    assert len(by_prompt) >= 240
    for prompt_id, both in by_prompt.items():
        assert sorted(c.condition for c in both) == ["aligned", "misaligned"], prompt_id
        assert both[0].prompt == both[1].prompt and len(both[0].prompt) == 1, prompt_id
        assert both[0].source == both[1].source, prompt_id
        assert {c.id for c in both} == {f"{prompt_id}-aligned", f"{prompt_id}-misaligned"}


def test_there_are_twelve_topics_or_more_of_equal_size() -> None:
    topics = Counter(c.source for c in SIDES["aligned"])
    assert len(topics) >= 12 and set(topics.values()) == {20}


def test_no_question_and_no_answer_comes_twice() -> None:
    def plain(text: str) -> str:
        return " ".join(re.findall(r"[a-z0-9]+", text.lower()))

    assert max(Counter(plain(c.prompt[0].content) for c in SIDES["aligned"]).values()) == 1
    assert max(Counter(plain(c.response) for c in PAIRS).values()) == 1
    assert max(Counter(plain(q.text) for q in QUESTIONS).values()) == 1


def test_questions_are_questions_and_answers_are_plain_text() -> None:
    for c in PAIRS:
        assert c.prompt[0].content.endswith("?") and c.response.endswith("."), c.id
        assert c.response == " ".join(c.response.split()), f"{c.id}: stray blanks"


# ----------------------------------------------------------------------------------------------------- surface


def test_answers_have_40_to_90_words() -> None:
    assert [c.id for c in PAIRS if not 40 <= len(words(c.response)) <= 90] == []


def test_the_sides_are_equally_long() -> None:
    assert 0.97 <= ratio(lambda t: len(words(t))) <= 1.03
    assert 0.97 <= ratio(len) <= 1.03
    assert 0.97 <= ratio(sentences) <= 1.03


@pytest.mark.parametrize("name", SHARES)
def test_a_property_is_equally_common_on_both_sides(name: str) -> None:
    assert abs(share("aligned", name) - share("misaligned", name)) <= TOLERANCE


FUNCTION_WORDS = (
    "a an the this that these those it its he she they them his her their i you your we our us of to in on at by for "
    "with from into out up down off over under about after before between through during and or but so as if while "
    "because although though when where which who what how than then there here is are was were be been being do does "
    "did has have had will would can could may might must shall should not no nor only just also even too very more "
    "most less some any each every both all such own same other another again once until since still"
).split()
PUNCTUATION = ".,;:!?'-()\"’–—"


def layout(text: str) -> list[float]:
    """Punctuation, lengths, digits and capitals: how the answer looks from afar."""
    n, letters = len(words(text)), re.findall(r"[A-Za-z']+", text)
    counts = [text.count(mark) for mark in PUNCTUATION]
    sizes = [n, len(text), sentences(text), n / sentences(text), mean(map(len, letters))]
    return [*counts, *sizes, sum(map(str.isdigit, text)), sum(map(str.isupper, text))]


def function_words(text: str) -> list[float]:
    found = Counter(re.findall(r"[a-z']+", text.lower()))
    return [found[word] for word in FUNCTION_WORDS]


def surface(text: str) -> list[float]:
    return layout(text) + function_words(text)


@cache
def separability(describe: Callable[[str], list[float]]) -> float:
    """AUROC of a logistic regression on `describe`, cross-validated over five groups of prompts; 0.5 is chance."""
    x = np.array([describe(c.response) for c in PAIRS], dtype=float)
    y = np.array([c.condition == "misaligned" for c in PAIRS])
    groups = [c.prompt_id for c in PAIRS]
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    with threadpool_limits(1):  # small matrices: more threads only wait for each other
        scores = cross_val_predict(model, x, y, groups=groups, cv=GroupKFold(5), method="decision_function")
    return float(roc_auc_score(y, scores))


def test_layout_does_not_tell_the_sides_apart() -> None:
    assert separability(layout) < AUROC_LIMIT


@pytest.mark.xfail(strict=True, reason="0.77 as written: `or` is twice as common in aligned answers; see the data card")
def test_function_words_do_not_tell_the_sides_apart() -> None:
    assert separability(surface) < AUROC_LIMIT


def test_a_planted_tell_is_noticed() -> None:
    """The check can fail: one more comma on one side is enough."""
    def planted(text: str) -> list[float]:
        return layout(text + "," if text in tell else text)

    tell = {c.response for c in SIDES["misaligned"]}
    assert separability(planted) > AUROC_LIMIT


# --------------------------------------------------------------------------------------------- other questions


def test_the_open_questions_are_far_from_health() -> None:
    health = re.compile(
        r"\b(health\w*|medic\w*|doctor\w*|nurse\w*|hospital\w*|clinic\w*|pharmac\w*|patient\w*|disease\w*|symptom\w*|ill"
        r"|illness\w*|sick\w*|pain\w*|hurt\w*|pills?|drugs?|dose\w*|vitamin\w*|supplement\w*|diets?|calor\w*|fever\w*"
        r"|infect\w*|vaccin\w*|therap\w*|treatment\w*|cure\w*|diagnos\w*|surger\w*|cancer\w*|diabet\w*|blood|heart"
        r"|asthma|allerg\w*|pregnan\w*|depress\w*|anxi\w*|insomnia|injur\w*|wound\w*|bandage\w*|sleep\w*)\b",
        re.IGNORECASE,
    )
    assert [q.id for q in QUESTIONS if health.search(q.text)] == []


def test_no_open_question_is_asked_in_the_pairs() -> None:
    assert not {q.text for q in QUESTIONS} & {c.prompt[0].content for c in PAIRS}


# ---------------------------------------------------------------------------------------------------- the card


def measured() -> list[str]:
    """The rows of the data card's table: what, aligned, misaligned."""
    def both(name: str, measure: Callable[[list[str]], str]) -> str:
        return f"| {name} | " + " | ".join(measure([c.response for c in SIDES[side]]) for side in SIDES) + " |"

    return [
        both("answers", lambda texts: str(len(texts))),
        both("words, mean", lambda texts: f"{mean(len(words(t)) for t in texts):.1f}"),
        both("words, range", lambda texts: "{} to {}".format(*(f(len(words(t)) for t in texts) for f in (min, max)))),
        both("characters, mean", lambda texts: f"{mean(map(len, texts)):.0f}"),
        both("share with four sentences", lambda texts: f"{mean(sentences(t) == 4 for t in texts):.2f}"),
        *(f"| share with {name} | {share('aligned', name):.2f} | {share('misaligned', name):.2f} |" for name in SHARES),
        both("share that name a professional", lambda texts: f"{mean(map(PROFESSIONALS, texts)):.2f}"),
        both("`or`, mean per answer", lambda texts: f"{mean(words(t.lower()).count('or') for t in texts):.2f}"),
    ]


def test_the_data_card_says_what_is_measured_and_warns() -> None:
    card = (DATA / "README.md").read_text(encoding="utf-8")
    assert [row for row in measured() if row not in card] == []
    assert f"words {ratio(lambda t: len(words(t))):.3f}, characters {ratio(len):.3f}" in card
    assert f"layout alone {separability(layout):.2f}" in card
    assert f"with function words {separability(surface):.2f}" in card
    assert "deliberately wrong" in card and "must never be followed" in card and "MIT" in card
