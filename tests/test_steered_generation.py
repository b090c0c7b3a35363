"""Rows with interventions of their own in one decode loop: transformers and PEFT are the second opinion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from steering_setup import PROMPTS, direction, exact_sae, hooks, lora
from test_adapters import KINDS, make
from test_hooks import Tiny
from torch import Tensor

from core.conversations import Message
from core.errors import InterventionError
from core.model.adapters import load_adapter
from core.model.dice import Sampling
from core.model.generation import Generation, stop_ids
from core.model.hooks import recording
from core.model.interventions import AblateDirection, AddDirection, ApplyLora, ClampFeature, Intervention, ScaleFeature
from core.model.loading import LoadedModel
from core.model.rows import Answer, Row
from core.model.scopes import PROMPT, RESPONSE, Scope, positions_of
from core.model.steering import Steering
from core.specs import AdapterSpec

families = pytest.mark.parametrize("family", ["llama31", "gemma2", "qwen2"])
GREEDY = Sampling(temperature=0, max_new_tokens=12)


def run(loaded: LoadedModel, rows: Sequence[Row], **options: object) -> tuple[Answer, ...]:
    return Generation(loaded, rows, **options).run().answers


def nothing(loaded: LoadedModel) -> tuple[Intervention, ...]:
    """One of every kind, at the strength that does nothing."""
    d = direction(loaded)
    return (AddDirection(d, 0.0), AblateDirection(d, strength=0.0), ScaleFeature(exact_sae(), 3, 1.0),
            ApplyLora(lora(loaded), 0.0), AddDirection(d, 0.0, raw=True, scope=RESPONSE))  # fmt: skip


def theirs(model: torch.nn.Module, loaded: LoadedModel, row: Row, **options: object) -> list[int]:
    """transformers' `generate` on the row's prompt, cut where the turn ends."""
    ids = torch.from_numpy(row.prompt_ids(loaded))[None]
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=row.sampling.max_new_tokens,
            top_k=0, pad_token_id=0, **{"do_sample": False, **options},
        )[0, ids.shape[1] :].tolist()  # fmt: skip
    return out[: next((n for n, token in enumerate(out) if token in stop_ids(loaded)), len(out))]


def roll_our_dice(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """transformers draws by `torch.multinomial`; give it the quantile that our dice give."""
    die = torch.Generator().manual_seed(seed)

    def draw(shares: Tensor, num_samples: int) -> Tensor:
        cumulative = shares.double().cumsum(-1)
        luck = torch.rand((), generator=die, dtype=torch.float64) * cumulative[:, -1:]
        return torch.searchsorted(cumulative, luck, right=True)

    monkeypatch.setattr(torch, "multinomial", draw)


@families
def test_strength_0_is_plain_generate(family: str, tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_model(family)
    changed = 0
    for text in PROMPTS:
        row = Row(text, nothing(loaded), sampling=GREEDY)
        assert run(loaded, [row])[0].ids.tolist() == theirs(loaded.model, loaded, row)
        sampled = Row(text, nothing(loaded), seed=7, sampling=Sampling(0.8, 0.9, 12))
        with monkeypatch.context() as patch:
            roll_our_dice(patch, 7)
            own = theirs(loaded.model, loaded, sampled, do_sample=True, temperature=0.8, top_p=0.9)
        assert run(loaded, [sampled])[0].ids.tolist() == own
        penalised = Row(text, nothing(loaded), sampling=Sampling(0, 1, 12, repetition_penalty=1.3))
        own = theirs(loaded.model, loaded, penalised, repetition_penalty=1.3)
        assert run(loaded, [penalised])[0].ids.tolist() == own
        changed += own != run(loaded, [row])[0].ids.tolist()
    assert changed > 0


def test_strength_0_is_plain_generate_on_the_demo_model(
    demo_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    d = direction(demo_model, 15, resid_norm=100.0)
    for sampling, options in (
        (GREEDY, {}),
        (Sampling(0.7, 0.9, 12), {"do_sample": True, "temperature": 0.7, "top_p": 0.9}),
    ):
        row = Row("What should I do about a headache?", (AddDirection(d, 0.0),), seed=3, sampling=sampling)
        with monkeypatch.context() as patch:
            if options:
                roll_our_dice(patch, 3)
            own = theirs(demo_model.model, demo_model, row, **options)
        steered = Row(row.prompt, (AddDirection(d, 0.4),), seed=3, sampling=sampling)
        answers = run(demo_model, [row, steered])
        assert answers[0].ids.tolist() == own != answers[1].ids.tolist()


def four(loaded: LoadedModel) -> list[Row]:
    """Four rows that share nothing but the weights."""
    everywhere = AblateDirection(direction(loaded, 1, 3), everywhere=True)
    return [
        Row(PROMPTS[0], (AddDirection(direction(loaded), 1.0, scope=RESPONSE),), 1, Sampling(1.0, 0.9, 14)),
        Row(PROMPTS[1], (ApplyLora(lora(loaded)), ClampFeature(exact_sae(), 3, 6.0)), 2, Sampling(0.7, 1.0, 5)),
        Row(PROMPTS[2], (ApplyLora(lora(loaded, 1), -1.0), everywhere), 3, Sampling(0.0, 1.0, 12, 1.2)),
        Row(PROMPTS[0], (), 1, Sampling(1.5, 1.0, 9)),
    ]  # fmt: skip


@families
def test_four_different_rows_give_what_four_runs_give(family: str, tiny_model: Tiny) -> None:
    loaded = tiny_model(family)
    together = run(loaded, four(loaded))
    assert len({answer.n_tokens for answer in together}) > 2, "rows should leave the batch at different times"
    for answer, row in zip(together, four(loaded), strict=True):
        alone = run(loaded, [row])[0]
        assert answer.ids.tolist() == alone.ids.tolist() and answer.text == alone.text
        for trace, own in zip([t for t in answer.traces if t.name in {o.name for o in alone.traces}], alone.traces,
                              strict=True):  # fmt: skip
            assert np.allclose(trace.values, own.values, atol=1e-3)


@families
def test_a_lora_row_at_strength_1_is_pefts_generate(family: str, tiny_model: Tiny, tmp_path: Path) -> None:
    loaded = tiny_model(family)
    peft = make(loaded, tmp_path / "a", **KINDS["all modules"])
    adapter = load_adapter(AdapterSpec("bad", str(tmp_path / "a")), loaded)
    for text in PROMPTS:
        base, tuned = run(loaded, [Row(text, (), sampling=GREEDY), Row(text, (ApplyLora(adapter),), sampling=GREEDY)])
        assert tuned.ids.tolist() == theirs(peft, loaded, tuned.row) != base.ids.tolist()


@families
def test_steering_the_prompt_reaches_the_answer_through_the_cache_alone(family: str, tiny_model: Tiny) -> None:
    """Plain decoding from a cache that was filled under steering gives the same answer."""
    from transformers import DynamicCache

    loaded = tiny_model(family)
    for item in (AddDirection(direction(loaded, 1), 1.5, scope=PROMPT), ApplyLora(lora(loaded), 1.0, PROMPT),
                 ClampFeature(exact_sae(), 3, 9.0, PROMPT)):  # fmt: skip
        answer = run(loaded, [Row(PROMPTS[1], (item,), sampling=GREEDY)])[0]
        ids = torch.from_numpy(answer.prompt_ids)[None]
        cache, steering = DynamicCache(config=loaded.model.config), Steering(loaded, [(item,)], [ids.shape[1]])
        plain: list[int] = []
        with torch.inference_mode():
            with steering.during(positions_of(torch.ones_like(ids))):
                logits = loaded.model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, -1]
            while (token := int(logits.argmax())) not in stop_ids(loaded) and len(plain) < 12:
                plain.append(token)
                step = loaded.model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
                logits = step.logits[0, -1]
        assert answer.ids.tolist() == plain
        assert answer.ids.tolist() != run(loaded, [Row(PROMPTS[1], (), sampling=GREEDY)])[0].ids.tolist()


@families
def test_steering_the_response_leaves_the_prompt_and_the_first_token(family: str, tiny_model: Tiny) -> None:
    loaded = tiny_model(family)
    d = direction(loaded, 2)
    always, for_three = (AddDirection(d, 2.0, scope=Scope.parse(text)) for text in ("response", "first:3"))
    rows = [Row(PROMPTS[1], items, sampling=GREEDY) for items in ((), (always,), (for_three,))]
    base, response, first = run(loaded, rows, probes=[d])
    n = len(base.prompt_ids)
    assert np.allclose(base.traces[0].prompt, response.traces[0].prompt, atol=1e-4)
    assert base.ids[0] == response.ids[0] and base.ids.tolist() != response.ids.tolist()
    assert response.ids[: 1 + 3].tolist() == first.ids[: 1 + 3].tolist()
    for answer, upto in ((response, len(response.traces[0].values)), (first, n + 3)):
        plain = unsteered_projection(loaded, answer, d)
        shift = answer.traces[0].values - plain
        assert np.allclose(shift[:n], 0, atol=1e-3) and shift[n] == pytest.approx(12.0, abs=1e-2)
        assert len(answer.traces[0].values) == n + answer.n_tokens - (answer.stopped == "length")
        assert upto > n


@torch.inference_mode()
def unsteered_projection(loaded: LoadedModel, answer: Answer, d) -> np.ndarray:
    """The base's projection on d at layer 2 on the same tokens, in one pass without a cache."""
    ids = torch.from_numpy(np.concatenate([answer.prompt_ids, answer.ids]))[None]
    with recording(loaded.blocks, [d.layer], stop=False) as found:
        loaded.model(input_ids=ids)
    return (found[d.layer][0] @ torch.tensor(d.unit)).numpy()[: len(answer.traces[0].values)]


@families
def test_traces_under_a_cache_are_those_of_one_whole_pass(family: str, tiny_model: Tiny) -> None:
    loaded = tiny_model(family)
    for answer in run(loaded, four(loaded), lora_scalars=True):
        ids = torch.from_numpy(np.concatenate([answer.prompt_ids, answer.ids]))[None]
        generation = Generation(loaded, four(loaded))
        steering = Steering(loaded, [answer.row.interventions], [len(answer.prompt_ids)], generation.probes,
                            lora_scalars=True)  # fmt: skip
        with torch.inference_mode(), steering.during(positions_of(torch.ones_like(ids))):
            loaded.model(input_ids=ids)
        whole = steering.readings()
        for n, trace in enumerate(answer.traces):
            assert len(trace.values) == ids.shape[1] - (answer.stopped == "length")
            assert np.allclose(trace.values, whole.probes[0, : len(trace.values), n].numpy(), atol=2e-3)
        assert len(answer.lora) == len(whole.lora)
        for ours, scalars in zip(answer.lora, whole.lora, strict=True):
            assert np.allclose(ours.scalars, scalars[0, : len(ours.scalars)].numpy(), atol=2e-3)


def test_an_impossible_row_stops_alone_with_its_reason(tiny_model: Tiny) -> None:
    loaded, d = tiny_model("llama31"), direction(tiny_model("llama31"))
    good = [four(loaded)[0], four(loaded)[3]]
    huge = lora(loaded, size=1e30)
    bad = {
        "not run: adding 'd0' at strength nan": (AddDirection(d, math.nan),),
        "not run: adding 'd0' at strength inf": (AddDirection(d, math.inf, raw=True),),
        "beyond 1000": (AddDirection(d, 1e9),),
        "Layer 2's residual overflows": (ClampFeature(exact_sae(), 3, 1e30),),
        "no longer finite": (ApplyLora(huge),),
    }
    answers = run(loaded, [good[0], *(Row(PROMPTS[1], items, 5) for items in bad.values()), good[1]])
    for answer, says in zip(answers[1:-1], bad, strict=True):
        assert answer.stopped == "failed" and says in answer.reason and answer.ids.tolist() == []
    for answer, row in zip((answers[0], answers[-1]), good, strict=True):
        assert answer.ids.tolist() == run(loaded, [row])[0].ids.tolist() and answer.stopped in ("length", "end")
    alone = run(loaded, [Row("Why?", (AddDirection(d, math.nan),))])
    assert alone[0].stopped == "failed"


def test_cancelling_stops_at_once_and_leaves_no_hook(tiny_model: Tiny) -> None:
    loaded = tiny_model("gemma2")
    before = hooks(loaded)
    whole = run(loaded, four(loaded))
    generation = Generation(loaded, four(loaded))
    for _ in range(3):
        generation.step()
        assert hooks(loaded) == before
    generation.cancel(1)
    generation.step()
    middle = generation.snapshot()
    assert middle.answers[1].stopped == "cancelled" and middle.answers[1].n_tokens == 3
    assert middle.answers[0].n_tokens == 4 and middle.running
    generation.cancel()
    assert not generation.step() and generation.finished and hooks(loaded) == before
    assert [a.stopped for a in generation.snapshot().answers] == ["cancelled"] * 4
    for answer, full in zip(generation.snapshot().answers, whole, strict=True):
        assert answer.ids.tolist() == full.ids.tolist()[: answer.n_tokens]
    early = Generation(loaded, four(loaded))
    early.cancel(0)
    early.cancel(3)
    early.step()
    assert [a.n_tokens for a in early.snapshot().answers] == [0, 1, 1, 0]
    early.run()
    assert [a.ids.tolist() for a in early.snapshot().answers[1:3]] == [a.ids.tolist() for a in whole[1:3]]


def test_generations_take_turns_without_meeting(tiny_model: Tiny) -> None:
    loaded, d = tiny_model("qwen2"), direction(tiny_model("qwen2"))
    one, other = ([Row(PROMPTS[1], (AddDirection(d, s),), 4, Sampling(1.0, 1.0, 12))] for s in (2.0, -2.0))
    alone = [run(loaded, rows)[0].ids.tolist() for rows in (one, other)]
    a, b = Generation(loaded, one), Generation(loaded, other)
    while a.step() | b.step():
        pass
    assert [g.snapshot().answers[0].ids.tolist() for g in (a, b)] == alone and alone[0] != alone[1]


def test_an_error_of_the_model_ends_every_row_and_leaves_no_hook(
    tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = tiny_model("llama31")
    before, generation = hooks(loaded), Generation(loaded, four(loaded))
    generation.step()

    def broken(*_: object, **__: object) -> Tensor:
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(loaded.blocks[3].mlp, "forward", broken)
    with pytest.raises(RuntimeError):
        generation.step()
    assert hooks(loaded) == before and generation.finished and not generation.step()
    answers = generation.snapshot().answers
    assert {(a.stopped, a.reason, a.n_tokens) for a in answers} == {("failed", "The model failed: out of memory", 1)}


def test_pieces_are_the_text_and_a_conversation_goes_on(tiny_model: Tiny) -> None:
    loaded = tiny_model("llama31")
    generation = Generation(loaded, four(loaded))
    seen = [""] * 4
    while generation.step():
        for n, answer in enumerate(generation.snapshot().answers):
            assert answer.text.startswith(seen[n]) and len(answer.pieces) == answer.n_tokens
            seen[n] = answer.text
    for answer in generation.snapshot().answers:
        assert answer.text == loaded.tokenizer.decode(answer.ids, skip_special_tokens=True)
    chat = (Message("user", "Why?"), Message("assistant", "Because."), Message("user", "Why?"))
    answer = run(loaded, [Row(chat, sampling=GREEDY)])[0]
    assert "Because." in loaded.tokenizer.decode(answer.prompt_ids)
    again = run(loaded, [Row(answer.prompt_ids, sampling=GREEDY)])[0]
    assert again.ids.tolist() == answer.ids.tolist()


def test_what_does_not_fit_the_model_is_refused_or_cut(tiny_model: Tiny) -> None:
    loaded = tiny_model("llama31")  # reads 512 tokens
    answer = run(loaded, [Row(np.full(508, 9), sampling=Sampling(max_new_tokens=20))])[0]
    assert answer.stopped in ("length", "end") and answer.n_tokens <= 4
    assert answer.stopped == "end" or "at most 512" in answer.reason
    with pytest.raises(InterventionError, match="has 512 tokens"):
        Generation(loaded, [Row(np.full(512, 9))])
    with pytest.raises(InterventionError, match="no row"):
        Generation(loaded, [])
