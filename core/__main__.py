"""The command line: the app's calls without a browser.

Results go to standard output, progress and messages to standard error. Exit 0 on success, 2 on bad input (one
sentence, no traceback), 130 when interrupted. Heavy libraries are imported inside the commands, so --help is fast.
"""

from __future__ import annotations

import os

import typer

from core.commands import (
    answers,
    benchmark,
    cache,
    contrasts,
    directions,
    evaluation,
    generate,
    loras,
    sweep,
    training,
    variants,
)
from core.commands.shared import Commands

#: Threads that wait for each other must not spin: beside other programs that costs most of the speed. Torch reads it
#: when it loads, which is later.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__
)

#: In the order of --help; `sae_health` is called `sae-health`.
COMMANDS = (
    cache.plan, cache.fetch, cache.extract, cache.check,
    contrasts.rank, contrasts.attribute, variants.sae_health, contrasts.concordance, variants.difference,
    directions.direction, directions.decompose, loras.lora,
    training.train_sae, training.train_adapter, answers.sample, generate.generate, sweep.sweep, answers.rating_sheet,
    answers.apply_ratings, evaluation.evaluate, benchmark.benchmark,
)  # fmt: skip
for command in COMMANDS:
    app.command()(command)


if __name__ == "__main__":
    app(prog_name="python -m core")
