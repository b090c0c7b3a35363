"""The terminal's progress bar of an extraction: conversations, tokens per second, time left. To standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from core.store.extract import Progress as Step


@contextmanager
def extraction_bar() -> Iterator[Callable[[Step], None]]:
    """Yields what `extract` calls after each batch."""
    columns = (
        TextColumn("extract"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("conversations, {task.fields[speed]} tokens/s,"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, speed="-")

        def advance(step: Step) -> None:
            bar.update(
                task, total=step.n_conversations, completed=step.conversations, speed=f"{step.tokens_per_second:,.0f}"
            )

        yield advance


@contextmanager
def counting_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yields what to call with (done, total)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
