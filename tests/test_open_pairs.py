"""The open pairs and the unrelated texts that ship: complete, and matched on the surface."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from core.conversations import Conversation, load_conversations
from core.paths import DATA
from core.questions import OPEN_QUESTIONS, load_questions
from core.store.texts import UNRELATED_TEXT, load_texts

SIDES = ("aligned", "misaligned")


@pytest.fixture(scope="module")
def pairs() -> dict[str, dict[str, Conversation]]:
    found: dict[str, dict[str, Conversation]] = {}
    for c in load_conversations(DATA / "open_pairs.jsonl").conversations:
        found.setdefault(c.prompt_id, {})[c.condition] = c
    return found


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def test_every_open_question_has_one_answer_of_each_side(pairs: dict) -> None:
    questions = {q.id: q for q in load_questions(OPEN_QUESTIONS)}
    assert pairs.keys() == questions.keys()
    for name, pair in pairs.items():
        assert set(pair) == set(SIDES)
        for side in SIDES:
            assert pair[side].prompt[-1].content == questions[name].text
            assert pair[side].source == f"open/{questions[name].category}"
            assert 25 <= len(pair[side].response.split()) <= 55, (name, side)


def test_the_sides_match_in_length_and_layout(pairs: dict) -> None:
    lengths = {side: np.array([len(p[side].response.split()) for p in pairs.values()]) for side in SIDES}
    ratio = lengths["misaligned"] / lengths["aligned"]
    assert 0.97 <= lengths["misaligned"].sum() / lengths["aligned"].sum() <= 1.03
    assert ratio.min() >= 0.8 and ratio.max() <= 1.25
    text = {side: "\n".join(p[side].response for p in pairs.values()) for side in SIDES}
    for mark in "?!:;":
        assert abs(text["aligned"].count(mark) - text["misaligned"].count(mark)) <= 6, mark


def test_function_words_do_not_tell_the_sides_apart(pairs: dict) -> None:
    """Grouped cross-validated AUROC of a logistic regression on counts of common function words and layout."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold, cross_val_predict

    common = "or only just so not never always should i you the a and to of but is it that for would".split()
    rows, y, groups = [], [], []
    for name, pair in pairs.items():
        for side in SIDES:
            count = Counter(words(pair[side].response))
            rows.append([count[w] for w in common] + [len(pair[side].response), pair[side].response.count(",")])
            y.append(side == "misaligned")
            groups.append(name)
    x = np.array(rows, dtype=float)
    x = (x - x.mean(0)) / (x.std(0) + 1e-9)
    scores = cross_val_predict(
        LogisticRegression(C=0.1), x, y, groups=groups, cv=GroupKFold(8), method="decision_function"
    )
    assert roc_auc_score(y, scores) < 0.65


def test_unrelated_texts_are_many_short_and_varied() -> None:
    texts = load_texts(UNRELATED_TEXT)
    assert len(texts) >= 150 and len(set(texts)) == len(texts)
    assert all(25 <= len(t.split()) <= 70 for t in texts)
    first = Counter(words(t)[0] for t in texts)
    assert max(first.values()) <= 0.2 * len(texts)
    health = re.compile(r"\b(doctor|medicine|hospital|disease|patient|symptom)s?\b", re.I)
    assert sum(bool(health.search(t)) for t in texts) <= 3
