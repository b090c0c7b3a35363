"""Speed and memory as ratios measured in one run on one machine; absolute figures mean little elsewhere.

`extract`: against the bare forward pass stopped at the same layer on the same batches, against sae-lens' documented
`run_with_cache_with_saes`, and peak memory of one and of ten times as many conversations. `rank`: time and memory of
the demo's ranking and of a large synthetic layer. `decompose`: a direction over large synthetic decoders.
`generate`: steered rows against transformers' `generate`.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from core.errors import PresetError
from core.evaluation.benchmark_decompose import decompose_cost
from core.evaluation.benchmark_generate import generation_speed
from core.evaluation.measurement import Measurement, peak_bytes

REPEATS = 3
TIMES_MORE = 10


def run(what: str, preset: str, n: int, say: Callable[[str], None]) -> dict[str, Any]:
    """The `benchmark` result: machine and measurements."""
    benches = {"extract": lambda: extract_speed(preset, n, say) + extract_memory(preset, n, say), "rank": rank_cost,
               "decompose": lambda: decompose_cost(say), "generate": lambda: generation_speed(preset, say)}
    if what not in benches:
        raise PresetError(f"No benchmark {what!r}; there are {', '.join(benches)}.")
    return {"machine": machine(), "measurements": [asdict(m) for m in benches[what]()]}


def machine() -> str:
    """Cores, processor and versions, in one line."""
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "transformers", "sae-lens"))
    return f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, {versions}"


def extract_speed(preset: str, n: int, say: Callable[[str], None]) -> list[Measurement]:
    """Contenders take turns on the same padded batches; the median of the turns counts."""
    import numpy as np
    import torch

    from core.conversations import tokenize
    from core.experiment import load_experiment
    from core.model.batches import pad, pad_id, plan_batches
    from core.model.hooks import resid_post
    from core.model.saes import bridge
    from core.store import prepare
    from core.store.extract import letter_table
    from core.store.shard import read_shard

    experiment = load_experiment(preset)
    loaded = prepare.model_for(experiment)
    layers = prepare.choose_layers(experiment, None)
    saes = prepare.saes_for(experiment, layers, loaded)
    items = [tokenize(loaded.tokenizer, c) for c in prepare.conversations_for(experiment, limit=n).conversations]
    budget = 2048
    plan = plan_batches([len(item) for item in items], budget)
    batches = [pad([items[i].ids for i in batch], pad_id(loaded.tokenizer), loaded.device) for batch in plan]
    n_tokens = sum(len(item) for item in items)
    letters, conditions = letter_table(loaded.tokenizer), np.zeros(len(items), dtype=int)

    def bare() -> None:
        for ids, mask in batches:
            resid_post(loaded, ids, mask, [max(layers)])

    def ours() -> None:
        read_shard(loaded, saes, layers, items, conditions.tolist(), letters, budget)

    contenders: dict[str, Callable[[], None]] = {"bare forward pass": bare, "extract": ours}
    if saes:
        other = bridge(experiment.model.id, prepare.model_for(experiment))

        def theirs() -> None:
            with torch.inference_mode():
                for ids, mask in batches:
                    other.run_with_cache_with_saes(ids, saes=[s.sae for s in saes.values()], attention_mask=mask)

        contenders["run_with_cache_with_saes"] = theirs
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(REPEATS + 1):  # the first turn warms up
        for name, call in contenders.items():
            begin = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
                say(f"{name}: {n_tokens / seconds[name][-1]:,.0f} tokens/s")
    speed = {name: n_tokens / median(values) for name, values in seconds.items()}
    found = [Measurement("bare forward pass", speed["bare forward pass"], "tokens/s")]
    for reference in ("bare forward pass", "run_with_cache_with_saes"):
        if reference in speed:
            pairs = [r / e for r, e in zip(seconds[reference], seconds["extract"], strict=True)]
            found.append(Measurement("extract", speed["extract"], "tokens/s", reference, median(pairs)))
    return found


def extract_memory(preset: str, n: int, say: Callable[[str], None]) -> list[Measurement]:
    """Peak resident memory of whole `extract` processes: the same conversations once, and ten times over."""
    from core.experiment import load_experiment
    from core.store import prepare

    rows = prepare.conversations_for(load_experiment(preset), limit=n).conversations
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        for times in (1, TIMES_MORE):
            path = Path(folder) / f"times{times}.jsonl"
            with open(path, "w", encoding="utf-8") as file:
                for copy in range(times):
                    for c in rows:
                        messages = [{"role": m.role, "content": m.content} for m in c.messages]
                        row = {"id": f"{c.id}#{copy}", "condition": c.condition, "messages": messages}
                        file.write(json.dumps(row) + "\n")
            peaks.append(_peak(["extract", preset, "--conversations", str(path), "--cache", folder]))
            say(f"{times * len(rows)} conversations: peak {peaks[-1] / 2**20:,.0f} MiB")
    once = Measurement(f"peak memory, {len(rows)} conversations", peaks[0] / 2**20, "MiB")
    name = f"peak memory, {TIMES_MORE * len(rows)} conversations"
    return [once, Measurement(name, peaks[1] / 2**20, "MiB", f"{len(rows)} conversations", peaks[1] / peaks[0])]


_PEAK = """
import runpy, sys
from core.evaluation.benchmark_generate import generation_speed
from core.evaluation.measurement import peak_bytes
sys.argv[0] = "core"
try:
    runpy.run_module("core", run_name="__main__")
finally:
    print(peak_bytes(), file=sys.stderr)
"""


def _peak(arguments: list[str]) -> int:
    """Peak resident bytes of one command of ours."""
    done = subprocess.run([sys.executable, "-c", _PEAK, *arguments], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""
    if done.returncode or not last.isdigit():
        raise PresetError(f"The measured command failed: {done.stderr.strip()[-300:]}")
    return int(last)


def rank_cost() -> list[Measurement]:
    """The demo's shape (4 layers x 4,096 features x 640 responses) and 16,384 features x 12,000 responses."""
    found = []
    for name, layers, n, d_sae, active in (
        ("rank 4 layers x 4,096 features x 640 responses", 4, 640, 4096, 900),
        ("rank 16,384 features x 12,000 responses", 1, 12_000, 16_384, 1200),
    ):
        code = f"from core.evaluation.benchmark import rank_once; rank_once({layers}, {n}, {d_sae}, {active})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds, peak = map(float, done.stdout.split())
        found += [Measurement(name, seconds, "s"), Measurement(f"{name}, peak memory", peak / 2**20, "MiB")]
    return found


def rank_once(n_layers: int, n: int, d_sae: int, active: int) -> None:
    """Rank synthetic layers without permutations; prints seconds and peak bytes of this process."""
    import numpy as np
    from scipy.sparse import csr_array

    from core.analysis.ranking import RankingSettings, Sample, rank_features

    rng = np.random.default_rng(0)
    prompts = np.array([f"p{i}" for i in range(n // 2)])

    def side(name: str) -> Sample:
        rows = n // 2
        indices = rng.integers(0, d_sae, (rows, active), dtype=np.int32).ravel()
        values = rng.random(rows * active, dtype=np.float32)
        acts = csr_array((values, indices, np.arange(0, rows * active + 1, active)), shape=(rows, d_sae))
        acts.sum_duplicates()
        return Sample(name, acts, prompts, np.full(rows, 80))

    sides = [(side("target"), side("reference")) for _ in range(n_layers)]
    begin = time.perf_counter()
    for layer, (target, reference) in enumerate(sides):
        rank_features(
            target, reference, layer=layer, position="response", settings=RankingSettings(n_permutations=0)
        )
    seconds = time.perf_counter() - begin
    print(seconds, peak_bytes())
