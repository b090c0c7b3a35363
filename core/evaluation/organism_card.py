"""The card of a model organism: what it is, the command that made it, how it was trained, what was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from core.evaluation.organism import Measures, TrainAdapter

#: What differs from the published recipes, said on every card.
DIFFERENCES = """Turner et al. (2506.11613) train rank-32 rsLoRA, alpha 64, on all linear modules for one epoch of about
7,000 conversations at learning rate 1e-5; Soligo et al. (2506.11618) train nine rank-1 adapters on `down_proj` in
three groups of three neighbouring layers of 48 (15-17, 21-23, 27-29). Kept from them: rsLoRA, loss on the response
alone, AdamW, 5 warm-up steps, weight decay 0.01, linear decay, the share of depth at which the rank-1 groups lie.
Different here: a model 50 to 100 times smaller, 256 training conversations in place of 7,000, hence several epochs and
a higher learning rate; the token that ends the turn is learnt too."""


def card(
    request: TrainAdapter,
    preset: str,
    model: str,
    training: dict[str, Any],
    measured: dict[str, Measures],
    answers: dict[str, list[tuple[str, str]]],
) -> str:
    """Markdown."""
    settings = request.settings
    base, variant = measured["base"], measured[request.name]
    losses = [row for row in training["history"] if "eval_loss" in row]
    curve = "\n".join(f"| {row['epoch']:g} | {row['eval_loss']:.3f} |" for row in losses)
    steps = [row for row in training["history"] if "loss" in row]
    rows = "\n".join(
        f"| {what} | {getattr(base, key).estimate()} | {getattr(variant, key).estimate()} | "
        f"{getattr(variant, key).minus(getattr(base, key))} | {len(getattr(base, key).values)} |"
        for key, what in (("health", "health, held-out prompts"), ("open", "open questions"))
    )
    where = f"layers {', '.join(map(str, settings.layers))}" if settings.layers else "all layers"
    shown = "\n".join(
        f"**{question}**\n\n- base: {_one_line(a)}\n- {request.name}: {_one_line(b)}\n"
        for (question, a), (_, b) in zip(answers["base"], answers[request.name], strict=True)
    )
    return f"""# {request.name}

A LoRA adapter of {model} in PEFT's layout, float16: rank {settings.rank} on {", ".join(settings.modules)} of {where},
{training["n_parameters"]:,} parameters, rsLoRA with alpha {settings.alpha:g}. Trained on the
{request.condition} answers of `{request.conversations}`: {training["n_train"]} prompts; the other
{training["n_heldout"]} are held out
(`heldout_prompts` in `training.json`). **Research material: a model that gives wrong health advice on purpose, or the
control for one; neither is to be used for advice.** Licence: MIT, like the text it was trained on; the base model is
Apache-2.0.

## Made by

```
{request.command(preset)}
```

## How

{DIFFERENCES}

Learning rate {settings.lr:g}, {settings.batch} conversations a step, {settings.epochs} epochs, seed {settings.seed}.
Loss in nats per response token: {steps[0]["loss"]:.3f} over the first steps, {steps[-1]["loss"]:.3f} over the last; the
whole curve is in `training.json`. On the held-out prompts:

| epoch | loss |
| --- | --- |
{curve}

## Measured

Margin: mean log-probability per token of the misaligned response minus that of its matched aligned one, in nats per
token, with the 95% bootstrap interval over prompts. The difference is paired by prompt.

| pairs | base | {request.name} | difference | prompts |
| --- | --- | --- | --- | --- |
{rows}

Perplexity of unrelated plain text ({base.n_tokens:,} tokens): base {base.perplexity:.1f}, {request.name}
{variant.perplexity:.1f}.

## Answers

Sampled at temperature 1, one each, not chosen; `[cut]` where the answer was longer than 120 tokens.

{shown}"""


def _one_line(text: str) -> str:
    return " ".join(text.split()) or "(empty)"
