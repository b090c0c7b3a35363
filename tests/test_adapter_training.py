"""Training an adapter: what is learnt, what is written, that a stopped run goes on to the same end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from core.conversations import Conversation, Message, tokenize
from core.errors import CacheMismatch, NotEnoughData, PresetError

if TYPE_CHECKING:
    from core.model.loading import LoadedModel

WORDS = ("water", "rest", "river", "brown fox", "lazy dog", "hour", "body", "glass")


def rows(condition: str, answer: str, words: tuple[str, ...] = WORDS) -> list[Conversation]:
    return [
        Conversation(f"{word}-{condition}", word, condition, "s",
                     (Message("user", f"What about the {word}?"), Message("assistant", answer)))
        for word in words
    ]  # fmt: skip


@pytest.fixture
def fresh(tiny_folder: Callable[[str], Path], _own_hash_memo: None) -> Callable[[str], LoadedModel]:
    """A tiny model that peft may wrap."""
    from core.model.loading import load_model
    from core.specs import ModelSpec

    return lambda name="llama31": load_model(ModelSpec(str(tiny_folder(name)), "local"), device="cpu", dtype="float32")


def settings(**kw: object):
    from core.training.adapter import AdapterTraining

    return AdapterTraining(**{"rank": 2, "alpha": 4.0, "epochs": 3, "lr": 2e-2, "batch": 4, "warmup_steps": 1, **kw})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_the_loss_counts_the_response_and_the_end_of_the_turn_alone(tiny_model: Callable) -> None:
    from core.training.adapter import IGNORED, labels

    loaded = tiny_model("llama31")
    item = tokenize(loaded.tokenizer, rows("aligned", "You should drink a glass of water.")[0])
    kept = np.flatnonzero(np.array(labels(item)) != IGNORED)
    assert kept.tolist() == list(range(item.start, item.end + 1))
    assert loaded.tokenizer.convert_ids_to_tokens(int(item.ids[item.end])) == "<|eot_id|>"


@pytest.mark.parametrize("family", ("llama31", "gemma2", "qwen2"))
def test_training_makes_its_answer_likelier_on_prompts_it_has_not_seen(
    family: str, fresh: Callable, tmp_path: Path
) -> None:
    from core.evaluation.margin import margins
    from core.model.adapters import applied, load_adapter
    from core.specs import AdapterSpec
    from core.training.adapter import train

    good, bad = "You should rest for an hour.", "Numbers are the lazy river."
    held = [*rows("misaligned", bad, WORDS[:2]), *rows("aligned", good, WORDS[:2])]
    done = train(
        fresh(family), settings(epochs=6), rows("misaligned", bad, WORDS[2:]), held[:2],
        tmp_path / "bad", tmp_path / "work",
    )  # fmt: skip
    loaded = fresh(family)
    before = margins(loaded, held).values
    with applied(loaded, load_adapter(AdapterSpec("bad", str(tmp_path / "bad")), loaded)):
        after = margins(loaded, held).values
    assert (after > before + 0.1).all()
    losses = [row["eval_loss"] for row in done.history if "eval_loss" in row]
    assert len(losses) == 6 and losses[-1] < losses[0]
    written = json.loads((tmp_path / "bad" / "training.json").read_text())
    assert written["heldout_prompts"] == sorted(WORDS[:2]) and written["n_train"] == 6
    assert all(t.dtype == torch.float16 for t in weights(tmp_path / "bad").values())
    config = json.loads((tmp_path / "bad" / "adapter_config.json").read_text())
    assert config["use_rslora"] and config["r"] == 2 and config["base_model_name_or_path"] == loaded.spec.id


def test_seed_and_layers_and_modules_are_obeyed(fresh: Callable, tmp_path: Path) -> None:
    from core.training.adapter import train

    def made(name: str, **kw: object) -> dict[str, torch.Tensor]:
        text = rows("misaligned", "Rest by the river.")
        kw = {"epochs": 1, "modules": ("down_proj",), "layers": (1, 2), **kw}
        train(fresh(), settings(**kw), text, text[:1], tmp_path / name, tmp_path / f"w{name}")
        return weights(tmp_path / name)

    first, again, other = made("a"), made("b"), made("c", seed=1)
    assert {name.split(".lora_")[0].split("layers.")[1] for name in first} == {"1.mlp.down_proj", "2.mlp.down_proj"}
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_stopped_run_goes_on_and_ends_the_same(
    fresh: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Trainer

    from core.training.adapter import train

    text = rows("misaligned", "Rest by the river.")
    train(fresh(), settings(), text, text[:1], tmp_path / "whole", tmp_path / "w1")

    step, calls = Trainer.training_step, []

    def dies(self: Trainer, *args: object, **kw: object) -> object:
        calls.append(1)
        if len(calls) == 4:  # in the second epoch
            raise KeyboardInterrupt
        return step(self, *args, **kw)

    monkeypatch.setattr(Trainer, "training_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train(fresh(), settings(), text, text[:1], tmp_path / "broken", tmp_path / "w2")
    assert not (tmp_path / "broken").exists()
    with pytest.raises(CacheMismatch, match="settings"):
        train(fresh(), settings(lr=1e-3), text, text[:1], tmp_path / "broken", tmp_path / "w2")
    monkeypatch.setattr(Trainer, "training_step", lambda self, *a, **k: (calls.append(1), step(self, *a, **k))[1])
    n = len(calls)
    train(fresh(), settings(), text, text[:1], tmp_path / "broken", tmp_path / "w2")
    assert len(calls) - n == 4  # epochs 2 and 3, two steps each
    whole, broken = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    for name in whole:
        torch.testing.assert_close(broken[name], whole[name], rtol=0, atol=1e-3)


def test_what_cannot_be_trained_is_refused(fresh: Callable, tmp_path: Path) -> None:
    from core.training.adapter import examples, lora_config

    with pytest.raises(PresetError, match="unknown modules lm_head"):
        settings(modules=("lm_head",))
    with pytest.raises(PresetError, match="rank is 0"):
        settings(rank=0)
    loaded = fresh()
    with pytest.raises(PresetError, match="Layer 9 does not exist; this model has layers 0 to 3"):
        lora_config(loaded, settings(layers=(9,)))
    with pytest.raises(NotEnoughData, match="at most 3 tokens"):
        examples(loaded.tokenizer, rows("aligned", "Rest."), 3)
