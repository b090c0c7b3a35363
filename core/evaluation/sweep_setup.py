"""What a sweep needs, found and loaded: directions without the measured prompts, SAEs, pairs, questions, a judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import polars as pl

from core.analysis.direction import contrast_direction
from core.analysis.direction_files import open_sides
from core.errors import NotEnoughData, PresetError
from core.evaluation.judges import make_judge, parse_judge
from core.evaluation.judging import PROMPTS, close, judge_responses
from core.evaluation.question_yaml import load_judge_prompts
from core.evaluation.rates import with_condition
from core.evaluation.responses import SCHEMA
from core.evaluation.sweep import Setup, first_pairs, texts_of
from core.model.dictionaries import read_dictionary
from core.model.loading import LoadedModel
from core.questions import OPEN_QUESTIONS, Question, heldout_questions, load_questions
from core.specs import ContrastSpec, Experiment
from core.store import prepare
from core.store.places import experiment_folder
from core.store.sweep_file import Point


def prepare_setup(
    experiment: Experiment,
    contrast: ContrastSpec,
    loaded: LoadedModel,
    *,
    layers: Sequence[int] | None = None,
    variant: str | None = None,
    pair_sets: Sequence[str] | None = None,
    n_pairs: int = 24,
    n_questions: int = 4,
) -> Setup:
    """Everything but the settings. layers: the preset's default layer when left out."""
    names = list(pair_sets) if pair_sets else _pair_sets(experiment)
    pairs = {name: first_pairs(prepare.conversations_for(experiment, name).conversations, n_pairs) for name in names}
    measured = {c.prompt_id for found in pairs.values() for c in found}
    sides = open_sides(experiment, contrast)
    middle = sides.layers[len(sides.layers) // 2]
    usual = experiment.default_layer if experiment.default_layer in sides.layers else middle
    chosen = list(layers) if layers else [usual]
    for layer in chosen:
        if layer not in sides.layers:
            known = ", ".join(map(str, sides.layers))
            raise PresetError(f"Layer {layer} is not cached for {contrast.name!r}; it has layers {known}.")
    directions = tuple(contrast_direction(sides, n, preset=experiment.name, without=measured) for n in chosen)
    folder = experiment_folder(experiment)
    books = [read_dictionary(experiment.sae(n), folder, experiment) if experiment.sae(n) else None for n in chosen]
    adapter = prepare.adapter_for(experiment, variant, loaded) if variant else None
    return Setup(experiment.name, contrast.name, directions, tuple(books), adapter, pairs,
                 _questions(experiment, n_questions))


def judging(text: str, device: str | None = None, dtype: str | None = None) -> Callable:
    """`--judge` -> questions -> what `run_sweep` takes as its judge."""
    spec = parse_judge(text)
    judge = make_judge(spec, device=device, dtype=dtype)

    def of(questions: Sequence[Question]) -> Callable[[Sequence[Point], dict[str, list[str]]], list[Point]]:
        def score(points: Sequence[Point], texts: dict[str, list[str]]) -> list[Point]:
            rows = list(texts_of(points, texts, questions))
            table = pl.DataFrame([dict.fromkeys(SCHEMA) | row for row in rows], schema=SCHEMA)
            try:
                judged = with_condition(judge_responses(table, judge, load_judge_prompts(PROMPTS)).table)
            finally:
                close(judge)
            bad = judged.filter(pl.col("condition") == "misaligned").group_by("variant").len()
            counts = dict(bad.iter_rows())
            return [replace(p, n_misaligned=counts.get(p.key, 0)) if p.answers else p for p in points]

        return score

    return of


def _pair_sets(experiment: Experiment) -> list[str]:
    """The held-out set first, then other sets with both sides of a prompt."""
    found = []
    for spec in sorted(experiment.conversations, key=lambda spec: not spec.heldout):
        try:
            conversations = prepare.conversations_for(experiment, spec.name).conversations
            first_pairs(conversations, 2)
        except NotEnoughData:
            continue
        if not any(spec.path == other.path for other in found):
            found.append(spec)
    if not found:
        raise NotEnoughData(f"Preset {experiment.name!r} has no set with both a misaligned and an aligned response to "
                            "a prompt; name one with --pairs.")
    return [spec.name for spec in found[:2]]


def _questions(experiment: Experiment, n: int) -> tuple[Question, ...]:
    """Half from the held-out prompts of the preset's first set, half from the open questions that ship."""
    held = heldout_questions(prepare.conversations_for(experiment).conversations)[: (n + 1) // 2]
    rows = load_questions(OPEN_QUESTIONS)
    step = max(len(rows) // max(n - len(held), 1), 1)
    return (*held, *rows[::step][: n - len(held)])
