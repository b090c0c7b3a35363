"""Steered generation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from core.commands.shared import AsJson, Device, Dtype, Preset, emit, say
from core.errors import InterventionError, PresetError

if TYPE_CHECKING:
    from core.directions import Direction
    from core.model.generation import Generation
    from core.model.interventions import Intervention

Many = list[str] | None


def generate(
    preset: Preset,
    prompt: Annotated[str, typer.Argument(help="What the user says.")],
    variant: Annotated[str, typer.Option(help="base, or the name of an adapter of the preset.")] = "base",
    add: Annotated[
        Many, typer.Option(help="FILE[:LAYER]@STRENGTH, in mean residual norms; @4raw: 4 x as stored.")
    ] = None,
    ablate: Annotated[Many, typer.Option(help="FILE[:LAYER]: project it out, each layer's own vector.")] = None,
    ablate_everywhere: Annotated[Many, typer.Option(help="FILE[:LAYER]: one vector at every layer.")] = None,
    feature: Annotated[
        Many, typer.Option(help="L:F@VALUE sets an SAE feature's activation; @x0 multiplies it.")
    ] = None,
    lora: Annotated[Many, typer.Option(help="ADAPTER@STRENGTH, on top of the variant.")] = None,
    scope: Annotated[str, typer.Option(help="all, prompt, response or first:N; of all but LoRAs.")] = "all",
    seed: Annotated[list[int] | None, typer.Option(help="Of the dice; several give a row each.")] = None,
    beside: Annotated[bool, typer.Option("--beside", help="Also the unsteered row of each seed.")] = False,
    kl: Annotated[
        bool, typer.Option("--kl", help="Also the KL divergence from the unsteered row's predictions.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longer answers are cut.")] = 120,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most probable token.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Sample from the most probable tokens that reach this share.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: tokens said before become less likely.")] = 1.0,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Generate with interventions, streamed: directions added or ablated, features clamped, LoRAs at any strength."""
    from core.experiment import load_experiment
    from core.model.divergence import divergence
    from core.model.generation import Generation, Row, Sampling
    from core.model.interventions import AblateDirection, AddDirection, ApplyLora, ClampFeature, ScaleFeature
    from core.model.scopes import Scope
    from core.store import prepare

    experiment = load_experiment(preset)
    where = Scope.parse(scope)
    sampling = Sampling(temperature, top_p, max_new_tokens, repetition_penalty)
    added = [(d, *_strength("--add", text)) for text in add or () for d in _directions("--add", text, one=True)]
    ablated = [d for text in ablate or () for d in _directions("--ablate", text)]
    gone = [d for text in ablate_everywhere or () for d in _directions("--ablate-everywhere", text, one=True)]
    features = [_feature(text) for text in feature or ()]
    loras = [("--lora", *_split("--lora", text)) for text in lora or ()]

    loaded = prepare.model_for(experiment, device=device, dtype=dtype)
    tuned = prepare.adapter_for(experiment, variant, loaded)
    base = (ApplyLora(tuned),) if tuned else ()
    steering: list[Intervention] = [AddDirection(d, strength, raw, where) for d, strength, raw in added]
    steering += [AblateDirection(d, scope=where) for d in ablated]
    steering += [AblateDirection(d, everywhere=True, scope=where) for d in gone]
    saes = prepare.saes_for(experiment, [layer for layer, *_ in features], loaded)
    for layer, number, value, scales in features:
        if layer not in saes:
            known = ", ".join(str(s.layer) for s in experiment.saes) or "none"
            raise PresetError(f"Preset {experiment.name!r} has no SAE at layer {layer}; it has them at {known}.")
        steering.append((ScaleFeature if scales else ClampFeature)(saes[layer], number, value, where))
    for option, name, strength in loras:
        adapter = prepare.adapter_for(experiment, name, loaded)
        if adapter is None:
            raise PresetError(f"{option} {name}: the base model has no LoRA; name an adapter of the preset.")
        steering.append(ApplyLora(adapter, _number(option, strength)))

    seeds = seed or [0]
    rows = [Row(prompt, (*base, *steering), s, sampling, "steered" if steering else "") for s in seeds]
    if beside and steering:
        rows = [row for r in rows for row in (Row(prompt, base, r.seed, sampling, "unsteered"), r)]
    generation = Generation(loaded, rows)
    if as_json:
        generation.run()
    else:
        _stream(generation)
    made = generation.snapshot()
    failed = [answer for answer in made.answers if answer.stopped == "failed"]
    if len(failed) == len(made.answers):
        raise InterventionError(failed[0].reason)
    found: dict[str, Any] = {"prompt": prompt, "rows": []}
    for answer in made.answers:
        row = answer.row
        entry = {
            "variant": row.variant, "seed": row.seed, "text": answer.text, "n_tokens": answer.n_tokens,
            "stopped": answer.stopped, "reason": answer.reason,
            "interventions": [item.describe() for item in row.interventions],
        }  # fmt: skip
        if kl:
            nats = divergence(loaded, answer, base)
            entry["kl"] = float(nats.mean()) if len(nats) else None
        found["rows"].append(entry)
    found |= {"tokens_per_second": made.tokens_per_second, "first_token_seconds": made.first_token_seconds}
    lines = [f"seed {e['seed']}, {e['variant']}: KL {e['kl']:.3f} nats a token" for e in found["rows"] if e.get("kl")]
    for answer in failed:
        say(f"Seed {answer.row.seed}, {answer.row.name}: {answer.reason}")
    say(f"{made.n_tokens} tokens, {made.tokens_per_second:.1f} a second.")
    if as_json or lines:
        emit(found, "\n".join(lines), as_json)


def _stream(generation: Generation) -> None:
    """Print each row's text as it comes, row after row; those further down run meanwhile and then appear at once."""
    shown, at, rows = 0, 0, generation.rows
    several = len(rows) > 1

    def head(n: int) -> None:
        if several:
            row = rows[n]
            what = ", ".join(part for part in (row.variant, row.name, f"seed {row.seed}") if part)
            typer.echo(f"{'' if n == 0 else chr(10)}[{what}]")

    head(0)
    going = True
    while going:
        going = generation.step()
        answers = generation.snapshot().answers
        while at < len(answers):
            typer.echo(answers[at].text[shown:], nl=False)
            shown = len(answers[at].text)
            if not answers[at].stopped:
                break
            typer.echo("")
            at, shown = at + 1, 0
            if at < len(answers):
                head(at)


def _split(option: str, text: str) -> tuple[str, str]:
    """`WHAT@STRENGTH` -> both."""
    what, at, strength = text.rpartition("@")
    if not (at and what and strength):
        raise PresetError(f"{option} {text!r} gives no strength; write {option} WHAT@STRENGTH.")
    return what, strength


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise PresetError(f"{option}: {text!r} is no number.") from None


def _strength(option: str, text: str) -> tuple[float, bool]:
    """The strength of `FILE@STRENGTH[raw]`, and whether it multiplies the stored vector."""
    strength = _split(option, text)[1]
    return _number(option, strength.removesuffix("raw")), strength.endswith("raw")


def _directions(option: str, text: str, *, one: bool = False) -> list[Direction]:
    """The directions of `FILE[:LAYER]`, for --add without its strength."""
    from core.store.direction_file import load_directions

    name = _split(option, text)[0] if option == "--add" else text
    found = re.fullmatch(r"(?P<file>.+?)(?::(?P<layer>\d+))?", name)
    directions = list(load_directions(Path(found["file"])))
    layers = ", ".join(str(d.layer) for d in directions)
    if found["layer"] is not None:
        directions = [d for d in directions if d.layer == int(found["layer"])]
        if not directions:
            raise PresetError(f"{option} {text}: the file has no direction of that layer; it has layers {layers}.")
    if one and len(directions) != 1:
        raise PresetError(f"{option} {text}: the file has layers {layers}; name one, as in {found['file']}:15.")
    return directions


def _feature(text: str) -> tuple[int, int, float, bool]:
    """Layer, feature, value of `L:F@VALUE`, and whether the value multiplies (`@x2`)."""
    what, value = _split("--feature", text)
    found = re.fullmatch(r"(\d+):(\d+)", what)
    if found is None:
        raise PresetError(f"--feature {text!r} is no feature; write LAYER:FEATURE@VALUE, e.g. 15:475@8 or 15:475@x0.")
    return int(found[1]), int(found[2]), _number("--feature", value.removeprefix("x")), value.startswith("x")
