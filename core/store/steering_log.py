"""Steered generations on disk: one JSON line each, with all that is needed to repeat it.

`cache/<preset>/steering/log.jsonl` grows by a line a generation; `cache/<preset>/steering/directions/` holds the
directions used, each once, named by its content. A line's `plan` reads back as the plan (`plan_of`), so the same model
gives the same tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from core import __version__
from core.conversations import Message
from core.directions import Direction
from core.errors import CacheError
from core.model.rows import Answer
from core.steering_plan import Dice, Hold, Pane, Plan, Push
from core.store.direction_file import as_bytes, load_direction

FORMAT = "em-microscope-steering"
FORMAT_VERSION = 1

_writing = threading.Lock()


def log_file(folder: Path) -> Path:
    """The log of an experiment whose files lie in `folder`."""
    return folder / "steering" / "log.jsonl"


def keep_direction(direction: Direction, folder: Path) -> Path:
    """Where `direction` lies below `folder`, written when it is not there yet: the same content, the same file."""
    stem = re.sub(r"[^A-Za-z0-9]+", "-", direction.name).strip("-")[:40] or "direction"
    words = [direction.name, direction.model, direction.layer, direction.resid_norm, dict(direction.origin)]
    said = json.dumps(words, sort_keys=True).encode()
    digest = hashlib.sha256(said + direction.vector.tobytes()).hexdigest()[:12]
    path = folder / "steering" / "directions" / f"{stem}-{digest}.safetensors"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        temporary.write_bytes(as_bytes([direction]))
        os.replace(temporary, path)
    return path


def files_of(plan: Plan, folder: Path) -> dict[int, Path]:
    """id of every direction of the plan -> its file, all of them written."""
    directions = [push.direction for pane in plan.panes for push in pane.pushes]
    directions += [plan.probe] if plan.probe is not None else []
    return {id(direction): keep_direction(direction, folder) for direction in directions}


def plan_record(plan: Plan, files: Mapping[int, Path]) -> dict[str, Any]:
    """The plan as JSON. Directions are named by their file, relative to the experiment's folder."""
    def name(direction: Direction) -> str:
        return str(Path("directions") / files[id(direction)].name)

    return {
        "preset": plan.preset, "dice": asdict(plan.dice), "scope": plan.scope,
        "probe": name(plan.probe) if plan.probe is not None else None,
        "panes": [
            {
                "name": pane.name, "variant": pane.variant, "lora": pane.lora, "seed": pane.seed, "beside": pane.beside,
                "messages": [asdict(message) for message in pane.messages],
                "pushes": [{"direction": name(p.direction), "named": p.direction.name, "layer": p.direction.layer,
                            "strength": p.strength, "raw": p.raw} for p in pane.pushes],
                "holds": [asdict(hold) for hold in pane.holds],
            }
            for pane in plan.panes
        ],
    }  # fmt: skip


def plan_of(record: Mapping[str, Any], folder: Path) -> Plan:
    """The plan of a record, its directions read from `folder`. Raises `CacheError` for a record that is not ours."""
    try:
        asked = record["plan"]

        def read(name: str) -> Direction:
            return load_direction(folder / "steering" / name)

        panes = tuple(
            Pane(
                pane["name"], pane["variant"], pane["lora"],
                tuple(Push(read(p["direction"]), p["strength"], p["raw"]) for p in pane["pushes"]),
                tuple(Hold(**hold) for hold in pane["holds"]), pane["seed"],
                tuple(Message(**message) for message in pane["messages"]), pane["beside"],
            )  # fmt: skip
            for pane in asked["panes"]
        )
        probe = read(asked["probe"]) if asked["probe"] else None
        return Plan(asked["preset"], panes, Dice(**asked["dice"]), asked["scope"], probe)
    except (KeyError, TypeError) as error:
        raise CacheError(f"{log_file(folder)}: a line is no generation of this program ({error}).") from None


def record(
    plan: Plan, files: Mapping[int, Path], answers: tuple[Answer, ...], made_by: Mapping[str, Any],
    divergences: Mapping[int, float],
) -> dict[str, Any]:
    """One generation as JSON: what was asked, by what it was made, and what came out."""
    return {
        "format": FORMAT, "format_version": FORMAT_VERSION,
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), "program": __version__,
        "plan": plan_record(plan, files), "made_by": dict(made_by),
        "answers": [
            {"pane": answer.row.name, "text": answer.text, "ids": answer.ids.tolist(), "stopped": answer.stopped,
             "reason": answer.reason, "kl_nats_per_token": divergences.get(n),
             "interventions": [item.describe() for item in answer.row.interventions]}
            for n, answer in enumerate(answers)
        ],
    }  # fmt: skip


def append(folder: Path, line: Mapping[str, Any]) -> Path:
    """Add one line to the log; whole or not at all as far as the system writes at once."""
    path = log_file(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = (json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode()
    with _writing, open(path, "ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return path


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Every line of the log, oldest first; a last line that was cut off is left out."""
    path = log_file(folder)
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1] if line.strip()]
