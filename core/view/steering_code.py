"""A steering plan as what one would type: `python -m core generate ...`, a line a pane, or a short Python script.

Both name the direction files that core.store.steering_log keeps, so they give the same tokens. Pure text.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from core.directions import Direction
from core.steering_plan import Pane, Plan


def commands(plan: Plan, files: Mapping[int, Path], root: Path) -> str:
    """One command a pane, each under its name; a conversation of several turns has none. Paths from `root`."""
    lines = []
    for pane in plan.panes:
        if len(pane.messages) != 1:
            return ""
        lines += [f"# {_line(pane.name)}", command(plan, pane, files, root)]
    return "\n".join(lines)


def command(plan: Plan, pane: Pane, files: Mapping[int, Path], root: Path) -> str:
    """The command of one pane."""
    words = ["python", "-m", "core", "generate", plan.preset, pane.prompt]
    if pane.variant != "base":
        words += ["--variant", pane.variant] if pane.lora == 1 else ["--lora", f"{pane.variant}@{_number(pane.lora)}"]
    for push in pane.pushes:
        strength = f"{_number(push.strength)}{'raw' if push.raw else ''}"
        words += ["--add", f"{_path(files, push.direction, root)}@{strength}"]
    for hold in pane.holds:
        words += ["--feature", f"{hold.layer}:{hold.feature}@{_number(hold.value)}"]
    if plan.scope != "all" and pane.steered:
        words += ["--scope", plan.scope]
    words += ["--seed", str(pane.seed), "--max-new-tokens", str(plan.dice.max_new_tokens),
              "--temperature", _number(plan.dice.temperature)]
    if plan.dice.top_p != 1:
        words += ["--top-p", _number(plan.dice.top_p)]
    if plan.dice.repetition_penalty != 1:
        words += ["--repetition-penalty", _number(plan.dice.repetition_penalty)]
    return shlex.join(words)


def script(plan: Plan, files: Mapping[int, Path], root: Path) -> str:
    """All panes in one batch, as Python."""
    names: dict[int, str] = {}
    for push in (push for pane in plan.panes for push in pane.pushes):
        names.setdefault(id(push.direction), f"direction_{len(names)}")
    by_id = {id(push.direction): push.direction for pane in plan.panes for push in pane.pushes}
    adapters = {v: f"adapter_{n}" for n, v in enumerate(dict.fromkeys(p.variant for p in plan.panes)) if v != "base"}
    layers = sorted({hold.layer for pane in plan.panes for hold in pane.holds})
    kinds = [kind for kind, used in (("AddDirection", names), ("ApplyLora", adapters), ("ClampFeature", layers))
             if used]
    lines = ["from pathlib import Path", ""] if names else []
    lines += ["from core.conversations import Message", "from core.experiment import load_experiment",
              "from core.model.generation import Generation, Row, Sampling"]
    lines += [f"from core.model.interventions import {', '.join(kinds)}"] if kinds else []
    lines += ["from core.model.scopes import Scope", "from core.store import prepare"]
    lines += ["from core.store.direction_file import load_direction"] if names else []
    dice = plan.dice
    lines += [
        "", f"experiment = load_experiment({plan.preset!r})", "loaded = prepare.model_for(experiment)",
        f"sampling = Sampling({dice.temperature}, {dice.top_p}, {dice.max_new_tokens}, {dice.repetition_penalty})",
        f"scope = Scope.parse({plan.scope!r})",
    ]  # fmt: skip
    lines += [f"{name} = load_direction(Path({str(_path(files, by_id[key], root))!r}))" for key, name in names.items()]
    lines += [f"{name} = prepare.adapter_for(experiment, {v!r}, loaded)" for v, name in adapters.items()]
    lines += [f"saes = prepare.saes_for(experiment, {layers}, loaded)"] if layers else []
    lines += ["rows = ["]
    for pane in plan.panes:
        done = [f"ApplyLora({adapters[pane.variant]}, {pane.lora})"] if pane.variant in adapters else []
        done += [f"AddDirection({names[id(p.direction)]}, {p.strength!r}, {p.raw}, scope)" for p in pane.pushes]
        done += [f"ClampFeature(saes[{h.layer}], {h.feature}, {h.value!r}, scope)" for h in pane.holds]
        turns = ", ".join(f"Message({m.role!r}, {m.content!r})" for m in pane.messages)
        lines.append(f"    Row([{turns}], ({''.join(d + ', ' for d in done)}), {pane.seed}, sampling, {pane.name!r}),")
    lines += ["]", "for answer in Generation(loaded, rows).run().answers:",
              '    print(f"[{answer.row.name}] {answer.text}\\n")']
    return "\n".join(lines).replace(", ),", ",),")


def _path(files: Mapping[int, Path], direction: Direction, root: Path) -> str:
    path = files[id(direction)]
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _number(value: float) -> str:
    return repr(int(value)) if value == int(value) else repr(value)


def _line(text: str) -> str:
    return " ".join(text.split())
