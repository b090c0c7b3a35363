"""Speed and memory."""

from __future__ import annotations

from typing import Annotated

import typer

from core.commands.shared import AsJson, emit, say


def benchmark(
    what: Annotated[str, typer.Argument(help="extract, rank, decompose or generate.")],
    preset: Annotated[str, typer.Option(help="Name of a preset.")] = "demo",
    n: Annotated[int, typer.Option(min=8, help="Conversations read by every contender.")] = 64,
    as_json: AsJson = False,
) -> None:
    """Speed and memory as ratios to the bare forward pass, in one run."""
    from core.evaluation import benchmark as benches

    made = benches.run(what, preset, n, say)
    lines = [
        f"{m['name']}: {m['value']:,.4g} {m['unit']}"
        + (f" ({m['ratio']:.2f} x {m['reference']})" if m["ratio"] else "")
        for m in made["measurements"]
    ]
    emit(made, "\n".join([made["machine"], *lines]), as_json)
