"""Training: SAEs where none are published, LoRA model organisms."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from core.commands.shared import AsJson, Device, Layers, Preset, emit, parse_layers, say


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
    from core.store.places import experiment_folder
    from core.training.run import TrainSae, run

    experiment = load_experiment(preset)
    request = TrainSae(
        corpus=tuple(map(str, corpus)),
        first=tuple(map(str, first or ())),
        layers=prepare.choose_layers(experiment, parse_layers(layers)),
        out=out or experiment_folder(experiment) / "saes",
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
    from core.store.places import experiment_folder
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
        out=out or experiment_folder(experiment) / "adapters",
        work=work or paths.CACHE / "work" / experiment.name,
    )
    measured = run(
        lambda: prepare.model_for(experiment, device=device), experiment.name, request, rows.conversations, say
    )
    result = {"adapter": str(request.out / name), "measures": summary(measured)}
    emit(result, "" if as_json else organism_text(result), as_json)
