"""The house rules of the architecture, read from the source: who may import whom, and what stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.paths import ROOT

#: Room (or single file) -> floor. A room imports from floors below it, and from itself.
FLOORS = {
    "core.errors": 0,
    "core.specs": 1,
    "core.paths": 1,
    "core.conversations": 2,
    "core.directions": 2,
    "core.dictionary": 2,
    "core.steering_plan": 2.4,
    "core.split": 2.3,
    "core.questions": 2.5,
    "core.experiment": 2.5,
    "core.model": 2.6,
    "core.store": 3,
    "core.training": 3,
    "core.analysis": 4,
    "core.evaluation": 4.5,
    "core.view": 5,
    "core.commands": 6,
    "core.__main__": 6.5,
    "pages": 6,
    "streamlit_app": 6,
}

#: Package -> the only places that may import it.
KEEPERS = {
    "streamlit": ("core/view/session/", "pages/", "streamlit_app.py"),
    "h5py": ("core/store/",),
    "sae_lens": ("core/model/saes.py", "core/training/sae.py"),
    "peft": ("core/training/adapter.py",),
    "torch": ("core/model/", "core/training/", "core/store/", "core/evaluation/"),
}

#: What `--help` and the app on a finished cache import; none of it may load what computes a cache.
LIGHT = ("core.specs", "core.conversations", "core.questions", "core.experiment", "core.analysis", "core.view",
         "core.store.layout", "core.store.places", "core.store.reader", "core.store.plan", "core.commands",
         "core.evaluation.rates", "core.evaluation.responses", "core.evaluation.report", "core.evaluation.agreement",
         "core.evaluation.reading_sheet", "core.evaluation.judge_api", "core.evaluation.judging",
         "core.__main__")  # fmt: skip
HEAVY = ("torch", "transformers", "sae_lens", "peft")

SOURCES = sorted(
    path for where in ("core", "pages") for path in (ROOT / where).rglob("*.py") if "__pycache__" not in path.parts
) + [path for path in [ROOT / "streamlit_app.py"] if path.is_file()]


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import in the file, also inside functions; `from core import x` gives core.x."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the full name"
            if node.module == "core" or (node.module or "").startswith("core."):
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    place = ROOT / Path(*whole.split("."))
                    is_module = place.is_dir() or place.with_suffix(".py").is_file()
                    yield node.lineno, whole if is_module else node.module
            else:
                yield node.lineno, node.module or ""


def room_of(module: str) -> str | None:
    return next((room for room in FLOORS if module == room or module.startswith(room + ".")), None)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_imports_only_from_floors_below_it(path: Path) -> None:
    room = room_of(name_of(path))
    if name_of(path) == "core":
        assert not list(imports(path)), "importing core must import nothing"
        return
    assert room is not None, f"{name_of(path)} has no floor yet: give it one in FLOORS"
    for line, module in imports(path):
        if module.split(".")[0] not in ("core", "pages", "streamlit_app") or module == "core":
            continue
        other = room_of(module)
        assert other is not None, f"{path}:{line}: {module} has no floor"
        assert other == room or FLOORS[other] < FLOORS[room], f"{path}:{line}: {room} must not import {other}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_packages_are_imported_only_by_their_keepers(path: Path) -> None:
    where = path.relative_to(ROOT).as_posix()
    for line, module in imports(path):
        keepers = KEEPERS.get(module.split(".")[0])
        assert keepers is None or where.startswith(keepers), f"{where}:{line}: only {keepers} may import {module}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_torch_hooks_are_registered_only_in_hooks_py(path: Path) -> None:
    found = [
        f"{path}:{node.lineno}: {node.attr}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr.startswith("register_") and node.attr.endswith("_hook")
    ]
    assert not found or path == ROOT / "core" / "model" / "hooks.py", found


def test_nothing_is_unpickled() -> None:
    for path in SOURCES:
        for line, module in imports(path):
            assert module.split(".")[0] not in ("pickle", "dill", "cloudpickle", "joblib"), f"{path}:{line}: {module}"


def test_what_opens_a_finished_cache_imports_neither_torch_nor_streamlit() -> None:
    names = [name for name in map(name_of, SOURCES) if name.startswith(LIGHT)]
    last = [name for name in names if f"{name}.".startswith("core.view.session.")]  # may import streamlit
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        f"    heavy = {HEAVY!r} if name in {last!r} else {(*HEAVY, 'streamlit')!r}\n"
        "    found = [p for p in heavy if p in sys.modules]\n"
        "    assert not found, f'importing {name} imports {found}'\n"
    )
    names = [name for name in names if name not in last] + last
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
