"""One progress bar for all long work, on stderr, so that stdout stays for results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")


def bar(show: bool = True) -> Progress:
    """A rich progress bar with a `rate` field; silent when `show` is False or stderr is no tty."""
    console = Console(stderr=True)
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.completed:,.0f} done · {task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not show or not console.is_terminal,
    )


def track(
    items: Iterable[T],
    description: str,
    size: Callable[[T], int] = lambda item: 1,
    *,
    total: int | None = None,
    unit: str = "tokens",
    show: bool = True,
) -> Iterator[T]:
    """Yield `items`, showing how much of `unit` is done and how many a second."""
    with bar(show) as progress:
        task = progress.add_task(description, total=total, rate="")
        for item in items:
            yield item
            progress.advance(task, size(item))
            speed = progress.tasks[task].speed
            progress.update(task, rate=f"{speed:,.0f} {unit}/s" if speed else "")
