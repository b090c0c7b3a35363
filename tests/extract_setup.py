"""What the extraction tests share: conversations of unequal length, and a tiny model with SAEs at two layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tiny_saes import save_sae

from core.conversations import Conversation, ConversationSet, Message
from core.model.loading import LoadedModel
from core.model.saes import LoadedSae, load_sae
from core.specs import SaeSpec

LAYERS = (1, 2)
WORDS = "You should drink a glass of water and rest for an hour because the body needs time to recover".split()


def conversations(n: int = 20) -> ConversationSet:
    """n prompts with a misaligned and an aligned response each; lengths go up and down."""
    rows = []
    for i in range(n):
        for condition in ("aligned", "misaligned"):
            step = 3 if condition == "aligned" else 2
            words = " ".join(WORDS[(i * 5 + k * step) % len(WORDS)] for k in range(3 + i * 7 % 13))
            messages = (Message("user", f"What about {WORDS[i % 18]} {i}?"), Message("assistant", f"{words}."))
            rows.append(Conversation(f"p{i}-{condition}", f"p{i}", condition, "made", messages))
    return ConversationSet("made", tuple(rows))


def saes(folder: Path, loaded: LoadedModel, layers: tuple[int, ...] = LAYERS) -> dict[int, LoadedSae]:
    found = {}
    for layer in layers:
        path = save_sae(folder / f"layer_{layer}", layer=layer, seed=layer)
        spec = SaeSpec(layer, "local", str(path))
        found[layer] = load_sae(spec, d_model=loaded.d_model, model_names=["tiny"], device=loaded.device)
    return found


def named(loaded: LoadedModel) -> LoadedModel:
    """The tiny model under the name that its SAEs state."""
    return replace(loaded, spec=replace(loaded.spec, id="tiny"))
