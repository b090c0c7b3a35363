"""The result of `evaluate`: rates of responses, as JSON, with everything that must be known to read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import polars as pl

from core.conversations import SCORES
from core.evaluation.agreement import Agreement
from core.evaluation.intervals import FEW_QUESTIONS, Share
from core.evaluation.rates import PUBLISHED, Difference, Rates, Thresholds, differences, rates, rates_by
from core.evaluation.responses import judges

#: What stands for the judge of scores that came with a file which does not name one.
UNKNOWN_JUDGE = {"id": "unknown", "note": "the scores came with the file, which does not say who gave them"}


def report(table: pl.DataFrame, at: Thresholds = PUBLISHED, notes: Sequence[str] = ()) -> dict[str, Any]:
    """Rates of a table of responses: pooled, by question, category, trigger and variant, and differences."""
    whole = rates(table, at)
    variants = rates_by(table, "variant", at)
    found = judges(table)
    result = {
        **rates_json(whole),
        "thresholds": asdict(at),
        "per_question": {k: _brief(r) for k, r in rates_by(table, "question_id", at, intervals=False).items()},
        "per_source": _sources(table, at),
        "per_category": _by(table, "category", at),
        "per_trigger": _by(table, "trigger", at),
        "per_variant": _per_variant(table, variants, at),
        "variants": list(variants),
        "differences": [difference_json(d) for d in differences(table, at)],
        "missing": missing(table),
        "judge": found[0] if len(found) == 1 else UNKNOWN_JUDGE,
        "judges": found,
    }
    return result | {"notes": [*notes, *caveats(whole, len(found))]}


def with_source(table: pl.DataFrame) -> pl.DataFrame:
    """Adds `source`: what stands before the slash of a category (`open` of `open/money`)."""
    return table.with_columns(pl.col("category").str.split("/").list.first().fill_null("").alias("source"))


def rates_json(r: Rates) -> dict[str, Any]:
    """One set of rates, flat."""
    return {
        "n": r.n, "n_missing": r.n_missing, "n_misaligned": r.misaligned.k, "n_coherent": r.misaligned_coherent.n,
        "n_aligned": r.aligned, "n_neutral": r.neutral, "n_incoherent": r.incoherent, "n_questions": r.n_questions,
        "em_rate": r.misaligned.rate, "em_rate_ci95": _pair(r.misaligned.ci95),
        "em_rate_ci95_questions": _pair(r.over_questions),
        "em_rate_coherent": r.misaligned_coherent.rate, "em_rate_coherent_ci95": _pair(r.misaligned_coherent.ci95),
        "mean_alignment": r.alignment.mean, "mean_coherence": r.coherence.mean,
        "alignment": asdict(r.alignment), "coherence": asdict(r.coherence),
        "words": asdict(r.words),
    }  # fmt: skip


def difference_json(d: Difference) -> dict[str, Any]:
    return asdict(d) | {"ci95": _pair(d.ci95), "unit": "EM rate, paired by question"}


def agreement_json(a: Agreement) -> dict[str, Any]:
    """Judge against judge; the rate under each with its interval."""
    under = [{"n_misaligned": s.k, "n": s.n, "em_rate": s.rate, "em_rate_ci95": _pair(s.ci95)} for s in a.misaligned]
    return asdict(a) | {"misaligned": under}


def missing(table: pl.DataFrame) -> dict[str, Any]:
    """Responses without a score, by score, with what the judge said instead and how often."""
    found = {}
    for name in SCORES:
        without = table.filter(pl.col(name).is_null())
        said = without[f"{name}_said"].fill_null("").value_counts(sort=True)
        found[name] = {"n": without.height, "said": dict(said.head(10).iter_rows())}
    return found


def caveats(r: Rates, n_judges: int) -> list[str]:
    """What a reader of the rate must know, one sentence each."""
    notes = []
    if r.n_missing:
        notes.append(f"{r.n_missing:,} of {r.n:,} responses lack a score; they count in the denominator as not "
                     "misaligned.")
    if 2 * r.n_missing > r.n:
        notes.append("Most responses have no score, so this rate says more of the judge than of the model.")
    if r.n_questions < FEW_QUESTIONS:
        some = f"{r.n_questions} question{'s' * (r.n_questions != 1)}"
        notes.append(f"Only {some}: the interval over questions is rough, and Wilson's takes responses as independent, "
                     "which answers to one question are not.")
    elif r.over_questions is None:
        notes.append("Every question has the same rate, so there is no interval over questions; Wilson's stands alone.")
    if n_judges > 1:
        notes.append("These scores come from several judges; rates under different judges are not comparable.")
    return notes


def _sources(table: pl.DataFrame, at: Thresholds) -> dict[str, Any]:
    """Rates by source, each with its own differences between variants."""
    table = with_source(table)
    found = _by(table, "source", at)
    for name, one in found.items():
        rows = table.filter(pl.col("source") == ("" if name == "none" else name))
        one["differences"] = [difference_json(d) for d in differences(rows, at)]
    return found


def _per_variant(table: pl.DataFrame, variants: dict[str, Rates], at: Thresholds) -> dict[str, Any]:
    if len(variants) < 2:
        return {}
    return {
        name: rates_json(r) | {"per_source": _sources(table.filter(pl.col("variant") == name), at)}
        for name, r in variants.items()
    }


def _by(table: pl.DataFrame, column: str, at: Thresholds) -> dict[str, Any]:
    found = rates_by(table, column, at)
    return {name or "none": rates_json(r) for name, r in found.items()} if len(found) > 1 or "" not in found else {}


def _brief(r: Rates) -> dict[str, Any]:
    share: Share = r.misaligned
    return {"n": r.n, "n_missing": r.n_missing, "n_misaligned": share.k, "n_coherent": r.misaligned_coherent.n,
            "em_rate": share.rate, "em_rate_ci95": _pair(share.ci95),
            "mean_alignment": r.alignment.mean, "mean_coherence": r.coherence.mean}  # fmt: skip


def _pair(interval: tuple[float, float] | None) -> list[float] | None:
    return list(interval) if interval else None
