"""Preset files (TOML) -> checked experiments.

Knows the preset form: keys are the fields of the dataclasses in specs.py. Does not know models, SAEs or caches:
nothing here imports torch, and whether an SAE exists is for core.store.plan to say.
"""

from __future__ import annotations

import difflib
import re
import tomllib
import types
from collections.abc import Collection
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from core.errors import PresetError
from core.paths import DATA, PRESETS
from core.specs import AdapterSpec, ContrastSpec, ConversationsSpec, Experiment, ModelSpec, SaeSpec, Side

DEFAULT_PRESET = "demo"

#: Fields of Experiment that a preset does not write: `name` is the file's own name, `extra` is filled here.
_NOT_KEYS = ("name", "extra")

#: Tables that may stand more than once, and what each row becomes.
_ROWS = {"saes": SaeSpec, "conversations": ConversationsSpec, "contrasts": ContrastSpec, "adapters": AdapterSpec}

_TYPE_NAMES = {str: "text", int: "a whole number", bool: "true or false", tuple: "a list", type(None): "nothing"}


def preset_names() -> list[str]:
    """Names of the presets that ship, the default one first."""
    names = sorted(path.stem for path in PRESETS.glob("*.toml"))
    return sorted(names, key=lambda name: name != DEFAULT_PRESET)


def load_experiment(name_or_path: str | Path) -> Experiment:
    """A shipped preset by name, or a user's own by the path of its .toml file (named after the file).

    Raises `PresetError` naming the file and the key: unknown preset, unknown, missing or ill-typed key, or a value
    that contradicts another (see the checks in specs.py).
    """
    path = _find(name_or_path)
    try:
        written = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PresetError(f"{path}: is not valid TOML: {str(error).rstrip('.')}.") from None
    except OSError as error:
        raise PresetError(f"{path}: cannot be read: {error.strerror}.") from None
    try:
        return _experiment(path, written)
    except PresetError as error:
        if str(error).startswith(f"{path}:"):
            raise
        raise PresetError(f"{path}: {error}") from None


def conversations_path(experiment: Experiment, name: str) -> Path:
    """Where the conversations called `name` lie: an absolute path, else the preset's folder, else core/data."""
    for spec in experiment.conversations:
        if spec.name == name:
            break
    else:
        known = [spec.name for spec in experiment.conversations]
        raise PresetError(
            f"Preset {experiment.name!r} has no conversations {name!r}; {_did_you_mean(name, known, 'it has')}."
        )
    return _place(experiment, spec.path, f"conversations {name!r}")


def answer_files(experiment: Experiment) -> list[Path]:
    """The files of judged answers that the preset names. Raises `PresetError` for one that is not there."""
    return [_place(experiment, written, "answers") for written in experiment.answers]


def _place(experiment: Experiment, path: str, what: str) -> Path:
    """Where a file that the preset names lies: an absolute path, else the preset's folder, else core/data."""
    written = Path(path).expanduser()
    folder = Path(experiment.extra["file"]).parent if "file" in experiment.extra else PRESETS
    places = [written] if written.is_absolute() else [folder / written, DATA / written]
    for place in places:
        if place.is_file():
            return place
    raise PresetError(
        f"Preset {experiment.name!r}, {what}: no file {' or '.join(str(p) for p in places)}; "
        "give a path relative to the preset or an absolute one."
    )


def _find(name_or_path: str | Path) -> Path:
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or text.endswith(".toml") or "/" in text or "\\" in text:
        path = Path(text).expanduser()
        if path.suffix != ".toml":
            raise PresetError(f"{path}: a preset of your own is a .toml file; give its path.")
        if not path.is_file():
            shipped = _did_you_mean(path.stem, preset_names(), "presets that ship are")
            raise PresetError(f"{path}: no such preset file; {shipped}.")
        return path
    if text not in preset_names():
        raise PresetError(
            f"No preset {text!r}; {_did_you_mean(text, preset_names(), 'presets that ship are')}, "
            "or give the path of a .toml file of your own."
        )
    return PRESETS / f"{text}.toml"


def _experiment(path: Path, written: dict[str, Any]) -> Experiment:
    values = _checked(path, "", Experiment, written, skip=_NOT_KEYS)
    values["model"] = ModelSpec(**_checked(path, "model", ModelSpec, written["model"]))
    for table, kind in _ROWS.items():
        rows = enumerate(written.get(table, []), 1)
        values[table] = tuple(_row(path, f"{table}[{n}]", kind, row) for n, row in rows)
        _no_duplicates(path, table, [row.layer if kind is SaeSpec else row.name for row in values[table]])
    experiment = Experiment(name=_as_name(path, "file name", path.stem), extra={"file": str(path)}, **values)
    for table in ("conversations", "adapters", "contrasts"):
        for row in getattr(experiment, table):
            _as_name(path, table, row.name)
    if "base" in (a.name for a in experiment.adapters):
        raise PresetError(f"{path}: an adapter is called 'base', which means the model without one; rename it.")
    if experiment.default_layer is not None and experiment.default_layer not in experiment.layers:
        raise PresetError(
            f"{path}: default_layer {experiment.default_layer} is not among the layers "
            f"{', '.join(str(n) for n in experiment.layers)}."
        )
    without = [s.layer for s in experiment.saes if s.layer not in experiment.layers]
    if without:
        raise PresetError(f"{path}: layers leaves out {without[0]}, for which an SAE is given; add it or drop the SAE.")
    return experiment


def _row(path: Path, where: str, kind: type, row: dict[str, Any]) -> Any:
    values = _checked(path, where, kind, row)
    if kind is ContrastSpec:
        for side in ("target", "reference"):
            values[side] = Side(**_checked(path, f"{where}.{side}", Side, row[side]))
    return kind(**values)


def _checked(path: Path, where: str, kind: type, table: Any, skip: Collection[str] = ()) -> dict[str, Any]:
    """The table's values, ready for `kind(**values)`: every key known, every required key there, types right."""
    place = f"{path}: {where}" if where else f"{path}"
    if not isinstance(table, dict):
        raise PresetError(f"{place}: is {_type_name(type(table))}, not a table.")
    wanted = {f.name: f for f in fields(kind) if f.name not in skip}
    hints = get_type_hints(kind)
    for key in table:
        if key not in wanted:
            raise PresetError(f"{place}: unknown key {key!r}; {_did_you_mean(key, wanted, 'keys are')}.")
    for key, one in wanted.items():
        optional = one.default is not MISSING or one.default_factory is not MISSING or key in _ROWS
        if key not in table and not optional:
            raise PresetError(f"{place}: missing key {key!r}.")
    values = {}
    for key, value in table.items():
        value = tuple(value) if isinstance(value, list) else value
        fits, wants = _fits(value, hints[key])
        if not fits:
            raise PresetError(f"{place}: key {key!r} is {str(table[key])[:60]!r}, not {wants}.")
        values[key] = value
    return values


def _fits(value: Any, hint: Any) -> tuple[bool, str]:
    """Whether `value` has the type of a field, and how that type is called in a message."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in inner, f"one of {', '.join(repr(i) for i in inner)}"
    if origin in (Union, types.UnionType):
        tried = [_fits(value, i) for i in inner]
        return any(fits for fits, _ in tried), " or ".join(wants for _, wants in tried if wants != "nothing")
    if origin is tuple:
        fits = isinstance(value, tuple) and all(_fits(v, inner[0])[0] for v in value)
        return fits, f"a list of items that are {_fits(None, inner[0])[1]}"
    if hint in (str, int, bool, type(None)):
        return isinstance(value, hint) and isinstance(value, bool) == (hint is bool), _type_name(hint)
    return isinstance(value, dict), "a table"  # one of our dataclasses, checked on its own


def _type_name(kind: type) -> str:
    return _TYPE_NAMES.get(kind, f"a {kind.__name__}")


def _as_name(path: Path, where: str, name: str) -> str:
    """Names become parts of file names and URLs, where `__` separates them."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or "__" in name:
        raise PresetError(
            f"{path}: {where}: {name!r} cannot be a name; use letters, digits, dots, hyphens and single underscores."
        )
    return name


def _no_duplicates(path: Path, table: str, names: list[Any]) -> None:
    twice = next((name for n, name in enumerate(names) if name in names[:n]), None)
    if twice is not None:
        raise PresetError(f"{path}: {table} gives {twice!r} twice; every one needs its own.")


def _did_you_mean(word: str, known: Collection[str], otherwise: str) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]!r}" if near else f"{otherwise} {', '.join(known) or 'none'}"
