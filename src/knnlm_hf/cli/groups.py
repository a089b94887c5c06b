"""Options that go together: written once as a dataclass, taken by a command as one argument.

    @app.command()
    @grouped
    def tune(model: Model, memories: Memories, reading: Reading = Reading()) -> None: ...

has on the command line every field of `Memories` and `Reading`, in this place and order. A default
other than the dataclass's own is said by the argument's default.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from typing import Any, get_type_hints

from knnlm_hf.cli.options import (
    BatchSize,
    CacheSize,
    Device,
    Dtype,
    Index,
    K,
    Lines,
    Lmbda,
    MatchLength,
    MatchWeight,
    Metric,
    MoreMemories,
    OptionalMemory,
    Rescore,
    Split,
    Stride,
    Temperature,
    Window,
)


@dataclass(frozen=True, kw_only=True)
class Memories:
    """Which memories, and how to search those that are datastores."""

    memory: OptionalMemory = None
    memories: MoreMemories = None
    cache: CacheSize = None
    k: K = None
    metric: Metric = None
    index: Index = None
    rescore: Rescore = False
    match_length: MatchLength = None

    @property
    def sources(self) -> list[str]:
        """All that are named."""
        return [name for name in (self.memory, *(self.memories or ())) if name is not None]

    @property
    def search(self) -> dict[str, Any]:
        """What was said of how to search."""
        given = {
            "k": self.k, "metric": self.metric, "index": self.index,
            "match_length": self.match_length,
        }  # fmt: skip
        found: dict[str, Any] = {name: one for name, one in given.items() if one is not None}
        return found | ({"rescore": True} if self.rescore else {})


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """What `tune` would find."""

    lmbda: Lmbda = None
    temperature: Temperature = None
    match_weight: MatchWeight = None

    @property
    def fitted(self) -> dict[str, float]:
        """What was said of a memory that searches."""
        given = {"temperature": self.temperature, "match_weight": self.match_weight}
        return {name: one for name, one in given.items() if one is not None}


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a corpus is read and cut into windows."""

    window: Window = None
    stride: Stride = None
    batch_size: BatchSize = 8
    split: Split = "test"
    lines: Lines = False

    @property
    def windows(self) -> dict[str, Any]:
        """The options of `score`, `perplexity` and `tune`."""
        return {"window": self.window, "stride": self.stride, "batch_size": self.batch_size}


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How a model is loaded."""

    model_dtype: Dtype = None
    device: Device = None


def grouped(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give `command` the fields of its dataclass arguments in their place."""
    hints = get_type_hints(command, include_extras=True)
    parameters = inspect.signature(command).parameters.values()
    expanded = [one for parameter in parameters for one in _expanded(parameter, hints)]

    @wraps(command)
    def flat(**given: Any) -> Any:
        for name, kind in hints.items():
            if is_dataclass(kind) and isinstance(kind, type):
                given[name] = kind(**{f.name: given.pop(f.name) for f in fields(kind)})
        return command(**given)

    flat.__signature__ = inspect.Signature(expanded)  # type: ignore[attr-defined]
    flat.__annotations__ = {one.name: one.annotation for one in expanded}
    del flat.__wrapped__
    return flat


def _expanded(parameter: inspect.Parameter, hints: dict[str, Any]) -> Iterator[inspect.Parameter]:
    kind = hints[parameter.name]
    if not is_dataclass(kind):
        yield parameter.replace(annotation=kind, kind=inspect.Parameter.KEYWORD_ONLY)
        return
    own = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        default = field.default
        if parameter.default is not inspect.Parameter.empty:
            default = getattr(parameter.default, field.name)
        assert default is not MISSING
        yield inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=own[field.name]
        )
