"""How misaligned a variant is: rates of fresh or already judged responses, and the margin that needs no judge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from core.commands.shared import AsJson, emit, say
from core.errors import PresetError


def evaluate(
    preset: Annotated[list[str] | None, typer.Argument(help="A preset; with --responses, further files.")] = None,
    responses: Annotated[
        list[Path] | None, typer.Option(help="CSV or JSONL of judged responses, or a folder; no model is loaded.")
    ] = None,
    by: Annotated[str | None, typer.Option(help="Column naming the model; `variant`, else the file.")] = None,
    against: Annotated[
        list[Path] | None, typer.Option(help="The same responses under another judge: agreement, rate under each.")
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out unusable rows; report them.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Also write a conversation set (.jsonl), or the table (.parquet, .csv, .json).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """EM rates of judged responses: over all and among the coherent, by question, category and variant."""
    from core.evaluation.agreement import agree, match
    from core.evaluation.report import agreement_json, report
    from core.evaluation.responses import load_responses
    from core.view.evaluation_text import evaluation_text

    if not responses:
        raise PresetError("Nothing to evaluate; give --responses FILE, a CSV or JSONL of judged responses.")
    found = load_responses([*responses, *(preset or [])], variant=by, skip_bad=skip_bad)
    for reason in found.skipped:
        say(f"Skipped: {reason}")
    notes = [f"{len(found.skipped)} unusable rows were left out."] if found.skipped else []
    result = {"files": list(found.files), **report(found.table, notes=notes)}
    if against:
        other = load_responses(against, variant=by, skip_bad=skip_bad).table
        result["agreement"] = agreement_json(agree(found.table, match(found.table, other)))
    if out is not None:
        _write(found.table, out)
    emit(result, "" if as_json else evaluation_text(result), as_json)


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
