"""Speed of steered generation against transformers' own `generate` on the same rows unsteered, in one run.

Contenders take turns; a ratio is the median over turns of the two speeds of one turn. All rows write `N_TOKENS` tokens,
as no token ends a turn here. Says nothing of what is written.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np

from core.evaluation.measurement import Measurement

N_TOKENS = 64
TURNS = 5
PROMPT = "I have had a headache since yesterday evening. What should I do about it?"


def generation_speed(
    preset: str, say: Callable[[str], None], n_tokens: int = N_TOKENS, turns: int = TURNS
) -> list[Measurement]:
    """Tokens/s of one and of four rows, steered and with a LoRA, against `generate`; time to the first token."""
    from core.experiment import load_experiment
    from core.store import prepare

    experiment = load_experiment(preset)
    loaded = prepare.model_for(experiment)
    layer = experiment.default_layer if experiment.default_layer is not None else experiment.layers[0]
    tuned = next((v for v in experiment.variants if v != "base"), None)
    adapter = prepare.adapter_for(experiment, tuned, loaded) if tuned else None
    return measure(loaded, layer, adapter, say, n_tokens, turns)


def measure(
    loaded: Any, layer: int, adapter: Any, say: Callable[[str], None], n_tokens: int, turns: int
) -> list[Measurement]:
    """The same for a loaded model, steering at `layer`, with the rows of the adapter left out where it is None."""
    import torch

    from core.directions import Direction
    from core.model.generation import Generation, Row, Sampling
    from core.model.interventions import AblateDirection, AddDirection, ApplyLora

    drawn = np.random.default_rng(0).standard_normal(loaded.d_model)
    d = Direction("random", loaded.spec.id, layer, drawn / np.linalg.norm(drawn))
    plus, minus = (AddDirection(d, strength, raw=True) for strength in (10.0, -10.0))
    one = [(plus,)]
    four = [(), (plus,), (minus,), (AblateDirection(d),)]
    firsts: dict[str, list[float]] = {}

    def ours(rows: list[tuple], sampling: Sampling, name: str) -> Callable[[], None]:
        def call() -> None:
            generation = Generation(loaded, [Row(PROMPT, items, 0, sampling) for items in rows], stops=())
            firsts.setdefault(name, []).append(generation.run().first_token_seconds)

        return call

    ids = torch.from_numpy(Row(PROMPT).prompt_ids(loaded))[None].to(loaded.device)
    settings = copy.deepcopy(loaded.model.generation_config)
    settings.update(eos_token_id=None, pad_token_id=0, max_length=None, max_new_tokens=n_tokens, do_sample=False)

    def theirs(n_rows: int, **options: Any) -> Callable[[], None]:
        batch = ids.repeat(n_rows, 1)

        def call() -> None:
            with torch.inference_mode():
                made = loaded.model.generate(
                    input_ids=batch, attention_mask=torch.ones_like(batch), generation_config=settings, **options
                )
            assert made.shape == (n_rows, ids.shape[1] + n_tokens), "generate ended a row early"

        return call

    greedy, drawn_settings = Sampling(0.0, 1.0, n_tokens), Sampling(1.0, 0.9, n_tokens)
    sampled = {"do_sample": True, "temperature": 1.0, "top_p": 0.9, "top_k": 0}
    contenders = {
        "generate, 1 row": (1, theirs(1)),
        "steered, 1 row": (1, ours(one, greedy, "1 row")),
        "generate, 4 rows": (4, theirs(4)),
        "steered, 4 rows": (4, ours(four, greedy, "4 rows")),
        "generate, 4 rows, sampled": (4, theirs(4, **sampled)),
        "steered, 4 rows, sampled": (4, ours(four, drawn_settings, "4 rows, sampled")),
    }
    if adapter is not None:
        panes = [(), (plus,), (ApplyLora(adapter),), (ApplyLora(adapter), plus)]
        name = "base and fine-tuned, unsteered and steered"
        contenders[name] = (4, ours(panes, greedy, name))
    speed: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(turns + 1):  # the first turn warms up
        for name, (n_rows, call) in contenders.items():
            begin = time.perf_counter()
            call()
            if turn:
                speed[name].append(n_rows * n_tokens / (time.perf_counter() - begin))
                say(f"{name}: {speed[name][-1]:.1f} tokens/s")

    def against(name: str, reference: str, said: str = "") -> Measurement:
        ratio = median(a / b for a, b in zip(speed[name], speed[reference], strict=True))
        return Measurement(said or name, median(speed[name]), "tokens/s", reference, ratio)

    found = [
        against("steered, 1 row", "generate, 1 row"),
        against("steered, 4 rows", "generate, 4 rows"),
        against("steered, 4 rows, sampled", "generate, 4 rows, sampled"),
        against("steered, 4 rows", "steered, 1 row", "steered, 4 rows against 1"),
        against("generate, 4 rows", "generate, 1 row", "generate, 4 rows against 1"),
    ]
    if adapter is not None:
        found.append(against(name, "generate, 4 rows"))
    for name, seconds in firsts.items():
        found.append(Measurement(f"first token, {name}", median(seconds[1:] or seconds), "s"))
    return found
