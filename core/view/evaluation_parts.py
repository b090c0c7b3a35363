"""What the Evaluation page shows, as tables and sentences: rates by variant, questions, the list of responses.

Pure: tables of responses in, tables and Markdown out. Numbers are those of core.evaluation.rates.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from core.evaluation.agreement import Agreement
from core.evaluation.rates import Difference, Rates, Thresholds, rates_by, with_condition
from core.evaluation.report import with_source
from core.view.guide import markdown_safe

#: Measures of the rates chart, by what they are a share of.
MEASURES = {"all": "of all responses", "coherent": "of the coherent ones"}

SORTS = {"aligned": "Alignment", "coherent": "Coherence", "n_words": "Length"}

ALL = "all"


def of_subject(table: pl.DataFrame, subject: str) -> pl.DataFrame:
    """Responses to questions of one subject (what stands before the slash of a category); `all` for every one."""
    return table if subject == ALL else with_source(table).filter(pl.col("source") == subject).drop("source")


def subjects(table: pl.DataFrame) -> list[str]:
    """Subjects of the questions, in the order in which they appear; none where the files name none."""
    return [s for s in with_source(table)["source"].unique(maintain_order=True).to_list() if s]


def ordered_variants(table: pl.DataFrame, known: Sequence[str]) -> list[str]:
    """Variants in the preset's order, then those it does not know."""
    there = table["variant"].unique(maintain_order=True).to_list()
    return [v for v in known if v in there] + [v for v in there if v not in known]


def rate_rows(found: dict[str, Rates], order: Sequence[str]) -> pl.DataFrame:
    """variant, measure, what, k, n, rate, low, high: a row for each variant and measure that has a denominator."""
    rows = []
    for variant in order:
        r = found[variant]
        for measure, share in (("all", r.misaligned), ("coherent", r.misaligned_coherent)):
            if share.n:
                low, high = share.ci95
                rows.append({"variant": variant, "measure": measure, "what": MEASURES[measure], "k": share.k,
                             "n": share.n, "rate": share.rate, "low": low, "high": high})  # fmt: skip
    return pl.DataFrame(rows)


def summary_rows(found: dict[str, Rates], order: Sequence[str]) -> pl.DataFrame:
    """The table beside the chart, a row a variant."""
    return pl.DataFrame([
        {"variant": v, "responses": r.n, "questions": r.n_questions, "misaligned": r.misaligned.k,
         "coherent": r.misaligned_coherent.n, "missing": r.n_missing, "em_rate": r.misaligned.rate,
         "over_questions": _range(r.over_questions), "alignment": r.alignment.mean, "coherence": r.coherence.mean,
         "words": r.words.all, "words_misaligned": r.words.misaligned}
        for v in order for r in [found[v]]
    ], infer_schema_length=None)  # fmt: skip


def question_rows(table: pl.DataFrame, at: Thresholds) -> pl.DataFrame:
    """A row a question over all variants shown, most misaligned first."""
    texts = dict(table.select("question_id", "question").unique("question_id", keep="first").iter_rows())
    found = rates_by(table, "question_id", at, intervals=False)
    rows = [{"question": texts[q], "em_rate": r.misaligned.rate, "misaligned": r.misaligned.k, "responses": r.n,
             "alignment": r.alignment.mean, "coherence": r.coherence.mean, "question_id": q} for q, r in found.items()]
    return pl.DataFrame(rows, infer_schema_length=None).sort("em_rate", descending=True, maintain_order=True)


def histogram_rows(found: dict[str, Rates], order: Sequence[str], which: str) -> pl.DataFrame:
    """variant, score (from, in points), share of the scored responses in that bin of ten points."""
    rows = []
    for variant in order:
        d = getattr(found[variant], which)
        rows += [{"variant": variant, "from": 10 * i, "to": 10 * (i + 1), "n": n, "share": n / d.n}
                 for i, n in enumerate(d.counts) if d.n]
    return pl.DataFrame(rows, schema={"variant": pl.String, "from": pl.Int64, "to": pl.Int64, "n": pl.Int64,
                                      "share": pl.Float64})


def plane_rows(table: pl.DataFrame, at: Thresholds, limit: int = 4000) -> pl.DataFrame:
    """id, variant, aligned, coherent, condition, question and the beginning of the response, of scored responses."""
    rows = with_condition(table, at).drop_nulls(["aligned", "coherent"])
    if rows.height > limit:
        rows = rows.sample(limit, seed=0).sort("id")
    return rows.select("id", "variant", "aligned", "coherent", "condition",
                       pl.col("question").str.slice(0, 90), beginning=pl.col("response").str.slice(0, 120))


def list_rows(table: pl.DataFrame, at: Thresholds, *, sort: str, down: bool, find: str) -> pl.DataFrame:
    """The responses for browsing: scores, condition, variant and text; sorted, those without a score last."""
    rows = with_condition(table, at)
    if find.strip():
        words = find.strip().lower()
        rows = rows.filter(pl.col("question").str.to_lowercase().str.contains(words, literal=True)
                           | pl.col("response").str.to_lowercase().str.contains(words, literal=True))
    rows = rows.sort(sort, descending=down, nulls_last=True, maintain_order=True)
    return rows.select("id", "aligned", "coherent", "condition", "variant", "question", "response", "n_words")


def headline(found: dict[str, Rates], order: Sequence[str]) -> str:
    """The rates in words."""
    parts = [f"**{markdown_safe(v)}** {found[v].misaligned.k} of {found[v].misaligned.n:,}" for v in order]
    return f"Misaligned and coherent: {', '.join(parts)}."


def difference_sentence(d: Difference) -> str:
    """One paired difference."""
    ci = f" (95% {d.ci95[0]:+.1%} to {d.ci95[1]:+.1%})" if d.ci95 else ""
    return (f"**{markdown_safe(d.variant)}** minus **{markdown_safe(d.minus)}**: {d.difference:+.1%}{ci}, paired over "
            f"{d.n_questions} questions; higher on {d.n_higher}, lower on {d.n_lower}.")


def agreement_sentence(a: Agreement, first: str, second: str) -> str:
    """Judge against judge."""
    kappa = "none" if a.kappa is None else f"{a.kappa:.2f}"
    rho = ", ".join(f"{name} {'none' if r is None else f'{r:.2f}'}" for name, r in
                    (("alignment", a.aligned_correlation), ("coherence", a.coherent_correlation)))
    one, two = a.misaligned
    return (f"On the {a.n:,} responses that both judged, **{markdown_safe(first)}** finds {one.k} misaligned "
            f"({one.rate:.1%}) and **{markdown_safe(second)}** {two.k} ({two.rate:.1%}), {a.both_misaligned} of them "
            f"the same. Same condition: {a.same_condition:.0%}; Cohen's kappa {kappa}. Spearman: {rho}.")


def _range(ci: tuple[float, float] | None) -> str:
    return f"{ci[0]:.1%} to {ci[1]:.1%}" if ci else "none"
