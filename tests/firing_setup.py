"""What the tests of LoRA firing share: a tiny model, an adapter of PEFT's making, two conversation sets, its file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import extract_setup as setup
from test_adapters import KINDS, make

from core.analysis.lora import Component, components
from core.conversations import Conversation, ConversationSet, Message
from core.evaluation.firing import FiringRun, read_firing
from core.model.adapter_files import read_factors
from core.model.adapters import Adapter, load_adapter
from core.model.loading import LoadedModel
from core.specs import AdapterSpec


@dataclass(frozen=True)
class Made:
    """A model with its adapter, as PEFT and as we have it."""

    loaded: LoadedModel
    adapter: Adapter
    parts: tuple[Component, ...]
    peft: Any


def build(loaded: LoadedModel, folder: Path, kind: str = "all modules", seed: int = 0, **more: Any) -> Made:
    peft = make(loaded, folder, seed=seed, **KINDS[kind] | more)
    spec = AdapterSpec("bad", str(folder))
    return Made(loaded, load_adapter(spec, loaded), components(read_factors(spec)), peft)


def sets(n: int = 9) -> list[ConversationSet]:
    """`made` (matched pairs of n prompts) and `other` (3 answers of one condition)."""
    messages = [(Message("user", f"And {w}?"), Message("assistant", f"Rest for {w} and drink water, {w}.")) for w in
                ("one", "two", "three")]
    other = [Conversation(f"o{i}", f"o{i}", "aligned", "open/x", m) for i, m in enumerate(messages)]
    return [setup.conversations(n), ConversationSet("other", tuple(other))]


def run(made: Made, path: Path, **options: Any) -> FiringRun:
    return read_firing(made.loaded, made.adapter, made.parts, sets(), path, **{"batch_tokens": 200, **options})
