"""What the commands share: option types, results and messages, errors as one sentence and an exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from core.errors import MicroscopeError, PresetError

Preset = Annotated[str, typer.Argument(help="Name of a preset, or the path of a .toml file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print a machine-readable result.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N or mps; chosen when left out.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; chosen by device when left out.")]
Layers = Annotated[str | None, typer.Option(help="Layers, e.g. 9,15; all of the preset's when left out.")]
CacheDir = Annotated[Path | None, typer.Option("--cache", help="Folder of the cache files; cache/PRESET by default.")]


class Commands(typer.core.TyperGroup):
    """The command group; turns what a user can cause into one sentence and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MicroscopeError as error:
            say(str(error))
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


def say(message: str) -> None:
    """A message to standard error."""
    typer.echo(message, err=True)


def emit(value: Any, text: str, as_json: bool) -> None:
    """A result to standard output, as JSON or as text."""
    typer.echo(json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1) if as_json else text)


def parse_layers(text: str | None) -> list[int] | None:
    """`9,15` -> [9, 15]. Raises `PresetError` for anything else."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise PresetError(f"--layers {text!r} is no list of whole numbers; write e.g. --layers 9,15.") from None
