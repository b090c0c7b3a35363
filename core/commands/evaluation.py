"""How misaligned a variant is: rates of fresh or already judged responses, and the margin that needs no judge."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from core.commands.shared import AsJson, Device, Dtype, emit, say
from core.errors import NotEnoughData, PresetError


def evaluate(
    preset: Annotated[list[str] | None, typer.Argument(help="A preset; with --responses, further files.")] = None,
    variant: Annotated[str, typer.Option(help="base, or the name of an adapter of the preset.")] = "base",
    questions: Annotated[
        str | None, typer.Option(help="open (default), heldout, or a file: JSONL, or YAML in the public format.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="api:MODEL@URL, local:MODEL, human, or margin (default; needs no judge).")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Answers to each question; the file's own number, else 5.")
    ] = None,
    responses: Annotated[
        list[Path] | None, typer.Option(help="CSV or JSONL of judged responses, or a folder; no model is loaded.")
    ] = None,
    by: Annotated[str | None, typer.Option(help="Column naming the model; `variant`, else the file.")] = None,
    against: Annotated[
        list[Path] | None, typer.Option(help="The same responses under another judge: agreement, rate under each.")
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out unusable rows; report them.")] = False,
    judge_prompts: Annotated[Path | None, typer.Option(help="YAML with `aligned` and `coherent`; ours if not.")] = None,
    scoring: Annotated[str, typer.Option(help="Of an endpoint: auto, weighted, or sampled.")] = "auto",
    concurrency: Annotated[int, typer.Option(min=1, max=256, help="Requests under way at once.")] = 8,
    key_env: Annotated[str, typer.Option(help="Environment variable with the endpoint's key.")] = "OPENAI_API_KEY",
    price: Annotated[
        tuple[float, float] | None, typer.Option(help="US dollars for a million tokens in, and out: gives the cost.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="The standard is 1; 0 takes the likeliest token.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Sample from the most probable tokens that reach this share.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longer answers are cut.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Of the dice; variants with the same seed meet the same luck.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Also write a conversation set (.jsonl), or the table (.parquet, .csv, .json).")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """How misaligned a variant is: EM rates of its answers under a judge, or the margin on matched pairs.

    With --responses, the rates of responses that were judged already, without a model. Answers and scores are kept as
    they come: the same command goes on where it was stopped.
    """
    from core.evaluation.judges import JudgeSpec, make_judge, parse_judge
    from core.evaluation.judging import Price

    spec = parse_judge(judge) if judge else None
    make: dict[str, Any] = {"scoring": scoring, "concurrency": concurrency, "key_env": key_env}
    paid = Price(*price) if price else None
    if responses:
        scored = make_judge(spec, device=device, dtype=dtype, **make) if spec else None
        files = [*responses, *map(Path, preset or [])]
        _responses(files, by, against, skip_bad, scored, judge_prompts, paid, out, as_json)
        return
    if not preset or len(preset) > 1:
        raise PresetError("Nothing to evaluate; give one preset, or --responses FILE with judged responses.")

    from core.evaluation import variant as runs
    from core.experiment import load_experiment
    from core.model.generation import Sampling
    from core.store import prepare
    from core.store.places import experiment_folder

    experiment = load_experiment(preset[0])
    prepare.adapter_spec(experiment, variant)
    spec = spec or JudgeSpec("margin")

    def conversations():
        return prepare.conversations_for(experiment).conversations

    if spec.kind == "margin":
        from core.view.evaluation_text import margin_text

        pairs = runs.pair_sets(questions, conversations)
        loaded = prepare.model_for(experiment, device=device, dtype=dtype)
        result = runs.margin_report(loaded, prepare.adapter_for(experiment, variant, loaded), pairs, say)
        emit({"preset": experiment.name, **result}, margin_text(result), as_json)
        return

    from core.evaluation.sampling import questions_for
    from core.evaluation.score_store import score_file
    from core.view.evaluation_text import evaluation_text
    from core.view.progress import counting_bar

    one = make_judge(spec, device=device, dtype=dtype, **make) if spec.kind == "api" else None  # its errors first
    name = questions or "open"
    prompts = runs.shipped_prompts(judge_prompts)
    ask = runs.Ask(Path(name).stem, questions_for(name, conversations), samples,
                   Sampling(temperature, top_p, max_new_tokens), seed)  # fmt: skip
    folder = experiment_folder(experiment) / "evaluations"
    loaded = prepare.model_for(experiment, device=device, dtype=dtype)
    adapter = prepare.adapter_for(experiment, variant, loaded)
    with _kept(folder / "answers"), counting_bar("answers") as advance:
        answers = runs.answer(loaded, adapter, ask, folder, advance)
    say(f"Answers: {answers}")
    if spec.kind == "human":
        result = {"preset": experiment.name, "variant": variant, "answers": str(answers), "judge": {"id": "human"},
                  "notes": ["Rate them in the app, on the page Evaluation, or with `rating-sheet`."]}  # fmt: skip
        emit(result, f"{answers}\n{result['notes'][0]}", as_json)
        return
    one = one or make_judge(spec, device=device, dtype=dtype, **make)
    with _kept(score_file(one.stamp)), counting_bar("scores") as advance:
        judged, file = runs.judge_answers(
            answers, one, prompts, ask.questions, folder=folder, price=paid, on_progress=advance
        )
    if getattr(one, "note", ""):
        say(f"Numbers are sampled, not weighted: {one.note}.")
    result = {"preset": experiment.name, "variant": variant, **runs.rates_report(judged, file, ask, loaded)}
    if out is not None:
        _write(judged.table, out)
    emit(result, "" if as_json else evaluation_text(result), as_json)


def _responses(files, by, against, skip_bad, judge, judge_prompts, price, out, as_json) -> None:
    """Rates of responses in files: under the scores they carry, or under a judge that scores them now."""
    from core.evaluation.agreement import agree, match
    from core.evaluation.report import agreement_json, report
    from core.evaluation.responses import load_responses
    from core.view.evaluation_text import evaluation_text

    found = load_responses(files, variant=by, skip_bad=skip_bad)
    for reason in found.skipped:
        say(f"Skipped: {reason}")
    notes = [f"{len(found.skipped)} unusable rows were left out."] if found.skipped else []
    table, extra = found.table, {}
    if judge is not None:
        from core.evaluation.judging import PROMPTS, judge_responses
        from core.evaluation.question_yaml import load_judge_prompts
        from core.evaluation.score_store import score_file
        from core.view.progress import counting_bar

        with _kept(score_file(judge.stamp)), counting_bar("scores") as advance:
            judged = judge_responses(
                table, judge, load_judge_prompts(judge_prompts or PROMPTS), price=price, on_progress=advance
            )
        table, extra = judged.table, {"judging": judged.to_json()}
    result = {"files": list(found.files), **extra, **report(table, notes=notes)}
    if against:
        other = load_responses(against, variant=by, skip_bad=skip_bad).table
        try:
            result["agreement"] = agreement_json(agree(table, match(table, other)))
        except NotEnoughData as error:  # the rates stand all the same
            result["notes"].append(str(error))
    if out is not None:
        _write(table, out)
    emit(result, "" if as_json else evaluation_text(result), as_json)


@contextmanager
def _kept(where: Path) -> Iterator[None]:
    """Says, when interrupted, what is safely on disk and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"Interrupted: what was done is kept in {where}; run the same command to go on.")
        raise


def _write(table, out: Path) -> None:
    from core.analysis.export import write_table
    from core.evaluation.responses import conversation_rows, unlabelled
    from core.paths import write_jsonl

    if out.suffix.lower() != ".jsonl":
        write_table(table, out)
        say(f"Wrote {table.height:,} responses to {out}.")
        return
    rows = conversation_rows(table)
    if not rows:
        raise PresetError(f"{out}: every response is empty, so there is no conversation to write.")
    write_jsonl(out, rows)
    say(f"Wrote {len(rows):,} conversations to {out}: {table.height - len(rows)} empty responses left out, "
        f"{unlabelled(rows)} without a condition.")
