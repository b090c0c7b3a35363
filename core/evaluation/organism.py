"""`train-adapter` from end to end: fine-tune, measure beside the base, write the card.

Measures what needs no judge: margins on held-out matched pairs, perplexity of unrelated text; and shows a few answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.conversations import Conversation, Message, load_conversations
from core.errors import NotEnoughData
from core.evaluation.margin import Margins, margins, perplexity
from core.evaluation.organism_card import card
from core.model.adapters import Adapter, applied, load_adapter
from core.model.generation import Sampling, generate, prompt_ids
from core.model.loading import LoadedModel
from core.paths import DATA, write_json, write_whole
from core.questions import OPEN_QUESTIONS, heldout_questions, load_questions
from core.specs import AdapterSpec
from core.split import split
from core.store.measures import MEASURES, MINUS_BASE, PAIRS
from core.store.texts import UNRELATED_TEXT, load_texts
from core.training.adapter import AdapterTraining, train

OPEN_PAIRS = DATA / "open_pairs.jsonl"

#: Health and open questions whose answers the card shows.
N_SHOWN = 3


@dataclass(frozen=True)
class TrainAdapter:
    """One call of `train-adapter`."""

    name: str
    condition: str
    """Responses with this condition are trained on."""
    conversations: str
    """Name or file of the conversation set."""
    settings: AdapterTraining
    out: Path
    """Folder of the adapters; the organism's own folder is inside it, under its name."""
    work: Path
    """Folder of the checkpoints; may be removed afterwards."""

    def command(self, preset: str) -> str:
        """The command line that makes the same organism."""
        s = self.settings
        parts = [
            f"python -m core train-adapter {preset} {self.name}",
            f"--conversations {self.conversations} --condition {self.condition}",
            f"--rank {s.rank} --alpha {s.alpha:g} --modules {','.join(s.modules)}",
            *([f"--layers {','.join(map(str, s.layers))}"] if s.layers else []),
            f"--epochs {s.epochs} --lr {s.lr:g} --batch {s.batch} --seed {s.seed}",
        ]
        return " \\\n  ".join(parts)


@dataclass(frozen=True)
class Measures:
    """What is measured of one variant."""

    health: Margins
    """On held-out prompts of the conversations the organisms are trained on."""
    open: Margins
    """On the open pairs."""
    perplexity: float
    n_tokens: int
    """Tokens of the unrelated text."""

    def to_json(self) -> dict[str, Any]:
        pairs = {
            name: dict(zip(m.prompt_ids, m.values.round(6).tolist(), strict=True))
            for name, m in (("health", self.health), ("open", self.open))
        }
        return {**pairs, "perplexity": self.perplexity, "n_tokens": self.n_tokens}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Measures:
        health, other = (Margins(tuple(row[n]), np.array(list(row[n].values()))) for n in ("health", "open"))
        return cls(health, other, row["perplexity"], row["n_tokens"])


def run(
    load: Callable[[], LoadedModel],
    preset: str,
    request: TrainAdapter,
    conversations: Sequence[Conversation],
    say: Callable[[str], None],
) -> dict[str, Measures]:
    """Train unless the adapter is there already, measure base and variant, write the card; returns both measures."""
    train_rows, heldout = split(conversations)
    chosen = [c for c in train_rows if c.condition == request.condition]
    if not chosen:
        raise NotEnoughData(f"{request.conversations}: no conversation has condition {request.condition!r}.")
    folder = request.out / request.name
    if (folder / "training.json").is_file():
        say(f"{folder} is there already.")
    else:
        say(f"Training {request.name} on {len(chosen)} conversations ...")
        train(load(), request.settings, chosen, [c for c in heldout if c.condition == request.condition],
              folder, request.work / request.name)  # fmt: skip
    loaded = load()
    adapter = load_adapter(AdapterSpec(request.name, str(folder)), loaded)
    measured = measure_all(loaded, [None, adapter], heldout, request.out / MEASURES, say)
    say("Sampling answers for the card ...")
    answers = {a.name if a else "base": sample_few(loaded, a, conversations) for a in (None, adapter)}
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    write_whole(folder / "README.md", card(request, preset, loaded.spec.id, training, measured, answers))
    return measured


def measure_all(
    loaded: LoadedModel,
    adapters: Sequence[Adapter | None],
    heldout: Sequence[Conversation],
    file: Path,
    say: Callable[[str], None],
) -> dict[str, Measures]:
    """Measures of each variant (None is the base); those in `file` of the same weights and text are not made again.

    `file` also gets every variant's margins minus the base's, for who only reads it (core/store/measures.py).
    """
    pairs = load_conversations(OPEN_PAIRS).conversations
    texts = load_texts(UNRELATED_TEXT)
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found = {}
    for adapter in adapters:
        name = adapter.name if adapter else "base"
        key = {
            "weights": loaded.weights_hash,
            "adapter": adapter.hash if adapter else None,
            "n": [len(heldout), len(pairs), len(texts)],
        }
        if {k: kept.get(name, {}).get(k) for k in key} != key:
            say(f"Measuring {name} ...")
            with applied(loaded, adapter) if adapter else nullcontext():
                ppl = perplexity(loaded, texts)
                made = Measures(margins(loaded, heldout), margins(loaded, pairs), ppl.value, ppl.n_tokens)
            kept[name] = {**key, **made.to_json()}
            write_json(file, with_minus_base(kept))
        found[name] = Measures.from_json(kept[name])
    return found


def with_minus_base(kept: dict[str, Any]) -> dict[str, Any]:
    """Rows of a measures file, those of the base's weights and pairs with their margins minus the base's."""
    rows = {name: {k: v for k, v in row.items() if k != MINUS_BASE} for name, row in kept.items()}
    base = rows.get("base")
    for name, row in rows.items():
        if base is None or name == "base" or any(row[k] != base[k] for k in ("weights", "n")):
            continue
        made, of_base = Measures.from_json(row), Measures.from_json(base)
        row[MINUS_BASE] = {what: asdict(getattr(made, what).minus(getattr(of_base, what))) for what in PAIRS}
    return rows


def sample_few(
    loaded: LoadedModel, adapter: Adapter | None, conversations: Sequence[Conversation]
) -> list[tuple[str, str]]:
    """(question, answer) for a few held-out prompts and a few open questions, spread over their files."""
    both = (heldout_questions(conversations), load_questions(OPEN_QUESTIONS))
    asked = [q for many in both for q in many[:: max(1, len(many) // N_SHOWN)][:N_SHOWN]]
    prompts = [prompt_ids(loaded, (Message("user", q.text),)) for q in asked]
    with applied(loaded, adapter) if adapter else nullcontext():
        answers = generate(loaded, prompts, list(range(len(asked))), Sampling())
    return [
        (q.text, loaded.tokenizer.decode(a.ids, skip_special_tokens=True).strip() + ("" if a.ended else " [cut]"))
        for q, a in zip(asked, answers, strict=True)
    ]


def summary(measured: dict[str, Measures]) -> dict[str, Any]:
    """Margins with intervals and perplexities, as JSON; `minus_base` is paired by prompt."""
    base = measured["base"]
    rows = {}
    for name, m in measured.items():
        rows[name] = {"perplexity": m.perplexity, "n_tokens": m.n_tokens}
        for what in ("health", "open"):
            own = getattr(m, what).estimate()
            rows[name][what] = asdict(own)
            if name != "base":
                rows[name][f"{what}_minus_base"] = asdict(getattr(m, what).minus(getattr(base, what)))
    return rows
