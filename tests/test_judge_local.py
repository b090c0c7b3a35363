"""The local judge against sums over whole token sequences by transformers itself, in every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import pytest
import torch
from test_rates import table

from core.conversations import Message
from core.evaluation.readings import Reading

if TYPE_CHECKING:
    from core.evaluation.judge_local import LocalJudge
    from core.model.loading import LoadedModel

FAMILIES = ("smollm2", "qwen2", "llama31", "gemma2", "gemma3", "mistral")
PROMPTS = ["How good is this?", "Rate the quick brown fox from 0 to 100, and tell me honestly what you think.", "85?"]


def read(judge: LocalJudge, prompts: list[str]) -> list[Reading]:
    done: dict[int, Reading] = {}
    judge.read(prompts, done.__setitem__, lambda i, why: pytest.fail(why))
    return [done[i] for i in range(len(prompts))]


def sequence_chances(loaded: LoadedModel, prompt: str, sequences: dict[int, tuple[int, ...]]) -> np.ndarray:
    """float64 [101] by brute force: every sequence run on its own, without a cache, and what may follow it."""
    from core.model.generation import prompt_ids

    start = prompt_ids(loaded, (Message("user", prompt),)).tolist()
    chances = np.zeros(101)
    for number, ids in sequences.items():
        with torch.inference_mode():
            logits = loaded.model(input_ids=torch.tensor([[*start, *ids]]), use_cache=False).logits[0].float()
        logprobs = torch.log_softmax(logits, dim=-1).double()
        chance = float(sum(logprobs[len(start) - 1 + k, t] for k, t in enumerate(ids)).exp())
        further = {s[len(ids)] for s in sequences.values() if len(s) > len(ids) and s[: len(ids)] == ids}
        chances[number] = chance * (1 - float(sum(logprobs[-1, t].exp() for t in further)))
    return chances


@pytest.mark.parametrize("family", FAMILIES)
def test_the_probability_of_every_number(tiny_model: Callable[[str], LoadedModel], family: str) -> None:
    from core.evaluation.judge_local import LocalJudge

    loaded = tiny_model(family)
    judge = LocalJudge(loaded)
    assert set(judge.sequences) == set(range(101)) and not judge.one_token
    assert {loaded.tokenizer.decode(list(ids)).strip() for ids in judge.sequences.values()} == set(map(str, range(101)))
    for prompt, reading in zip(PROMPTS, read(judge, PROMPTS), strict=True):
        wanted = sequence_chances(loaded, prompt, judge.sequences)
        got = np.array([reading.distribution.get(n, 0.0) for n in range(101)])
        np.testing.assert_allclose(got, wanted, rtol=2e-3, atol=1e-6)
        assert reading.kind == "digits" and reading.mass == pytest.approx(wanted.sum(), rel=1e-3)
        score = (wanted * np.arange(101)).sum() / wanted.sum() if wanted.sum() >= 0.25 else None
        assert reading.score == (pytest.approx(score, abs=0.05) if score is not None else None)


def test_whole_number_tokens_give_the_endpoint_score(tmp_path: Path) -> None:
    """With a tokenizer that has numbers as one token: the top 20 of one position, computed by hand."""
    import tiny_gguf

    from core.evaluation.judge_local import LocalJudge
    from core.model import bundled
    from core.model.generation import prompt_ids
    from core.model.loading import load_model
    from core.specs import ModelSpec

    tiny_gguf.write(tmp_path / "t.gguf")
    bundled.convert(tmp_path / "t.gguf", tmp_path / "hf")
    loaded = load_model(ModelSpec(str(tmp_path / "hf"), "local"), device="cpu", dtype="float32")
    judge = LocalJudge(loaded, batch_tokens=64)
    assert judge.one_token and judge.stamp.settings["scoring"] == "weighted"
    for prompt, reading in zip(PROMPTS, read(judge, PROMPTS), strict=True):
        ids = torch.tensor(prompt_ids(loaded, (Message("user", prompt),)))[None]
        with torch.inference_mode():
            shares = torch.softmax(loaded.model(ids).logits[0, -1].double(), dim=-1)
        top = shares.topk(20)
        words = [loaded.tokenizer.decode([t]).strip() for t in top.indices.tolist()]
        pairs = zip(words, top.values.tolist(), strict=True)
        numbers = [(int(t), p) for t, p in pairs if t.isdecimal() and int(t) <= 100]
        mass = sum(p for _, p in numbers)
        assert len(numbers) >= 10 and reading.kind == "weighted" and reading.mass == pytest.approx(mass, rel=1e-4)
        assert reading.score == pytest.approx(sum(n * p for n, p in numbers) / mass, rel=1e-4)


def test_batches_do_not_change_a_score_and_too_long_a_prompt_is_a_failure(
    tiny_model: Callable[[str], LoadedModel], tmp_path: Path
) -> None:
    from core.evaluation.judge_local import LocalJudge
    from core.evaluation.judging import judge_responses
    from core.questions import JudgePrompt

    loaded = tiny_model("qwen2")
    together = read(LocalJudge(loaded), PROMPTS)
    for prompt, reading in zip(PROMPTS, together, strict=True):
        alone = read(LocalJudge(loaded), [prompt])[0]
        assert alone.mass == pytest.approx(reading.mass, rel=1e-4)
    prompts = (JudgePrompt("aligned", "{answer}"), JudgePrompt("coherent", "Coherent? {answer}"))
    rows = table([(None, None)] * 2).with_columns(response=pl.Series(["short", "word " * 600]))
    found = judge_responses(rows, LocalJudge(loaded), prompts, folder=tmp_path)
    assert found.n_asked == 2 and sum(found.failures.values()) == 2
    assert all("more than the 512" in reason for reason in found.failures)


def test_the_demo_model_prefers_a_plain_number(demo_model: LoadedModel) -> None:
    """SmolLM2 writes numbers digit by digit; told a number, that is what it finds likeliest."""
    from core.evaluation.judge_local import LocalJudge

    reading = read(LocalJudge(demo_model), ["Write the number 85 and nothing else."])[0]
    assert reading.kind == "digits" and reading.mass > 0.25
    assert max(reading.distribution, key=reading.distribution.get) == 85
