"""The few types and range checks that every room shares.

Shape suffixes, here and everywhere: B batch, T position, Q query, K neighbour (or k), N datastore
entry, D hidden dimension, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol, get_args

from torch import Tensor

from knnlm_hf.errors import SettingError

Metric = Literal["l2", "ip"]
METRICS: tuple[Metric, ...] = get_args(Metric)


class Neighbors(NamedTuple):
    """The k nearest entries of Q queries, nearest first.

    `similarity` is −‖q−k‖² for `l2` and q·k for `ip`: always larger is nearer. A missing hit has
    similarity −inf, id −1 and token −1, and stands last.
    """

    similarity: Tensor
    """(Q, K) float32."""
    ids: Tensor
    """(Q, K) int64, entry numbers."""
    tokens: Tensor
    """(Q, K) int64, the value (next token) of each entry."""


class KeyRows(Protocol):
    """Random and sequential access to N keys of D dimensions, wherever they lie."""

    @property
    def dim(self) -> int:
        """D."""

    def __len__(self) -> int: ...

    def __getitem__(self, ids: Any) -> Tensor:
        """Rows `ids` (an int, slice, sequence or integer tensor of any shape) in stored dtype."""

    def blocks(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """All rows in order as (first entry number, (≤ size, D) view), without copying them."""


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite: told by the smallest and largest, which NaN passes into.

    On float16 a tenth of the time of looking at each.
    """
    return values.numel() == 0 or all(math.isfinite(bound) for bound in values.aminmax())


def check_metric(metric: str) -> Metric:
    """Return `metric` if it is one of `l2` and `ip`; raise `SettingError` otherwise."""
    for known in METRICS:
        if metric == known:
            return known
    raise SettingError(f"unknown metric {metric!r}: choose one of {', '.join(METRICS)}")


MOST_K = 1 << 20
"""Neighbours that may be asked for where there are fewer entries."""


def check_k(k: Any, entries: int | None = None) -> int:
    """Return `k` as an int if k ≥ 1; raise `SettingError` otherwise.

    With the number of a store's `entries`, k is bounded by them, or by `MOST_K` where that is more:
    results are that wide, whatever there is to find.
    """
    try:
        is_whole = not isinstance(k, bool) and int(k) == k
    except (TypeError, ValueError, OverflowError):
        is_whole = False
    if not is_whole or k < 1:
        raise SettingError(f"k is {k!r}, expected a whole number of neighbours, 1 or more")
    if entries is not None and k > max(entries, MOST_K):
        raise SettingError(
            f"k is {k}, expected {max(entries, MOST_K):,} at most: there are {entries:,} entries"
        )
    return int(k)


def check_count(name: str, value: Any, most: int | None = None) -> int:
    """Return `value` as an int if it is 1 or more; raise `SettingError` otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SettingError(f"{name} is {value!r}, expected a whole number, 1 or more")
    if most is not None and value > most:
        raise SettingError(f"{name} is {value}, expected {most} at most")
    if value > 1 << 62:
        raise SettingError(f"{name} is {value}, expected a whole number that 64 bits hold")
    return value


def check_temperature(temperature: Any) -> float:
    """Return the temperature as a float if 0 < t < ∞; raise `SettingError` otherwise."""
    value = _number("temperature", temperature)
    if not 0 < value < math.inf:
        raise SettingError(f"temperature is {temperature!r}, expected a number above 0")
    return value


MOST_MATCH_WEIGHT = 8.0


def check_match_weight(match_weight: Any) -> float:
    """Return γ as a float if 0 ≤ γ ≤ 8; raise `SettingError` otherwise."""
    value = _number("match_weight", match_weight)
    if not 0 <= value <= MOST_MATCH_WEIGHT:
        raise SettingError(
            f"match_weight is {match_weight!r}, expected 0 <= match_weight <= {MOST_MATCH_WEIGHT:g}"
        )
    return value


def check_lmbda(lmbda: Any) -> float:
    """Return λ as a float if 0 ≤ λ < 1; raise `SettingError` otherwise."""
    value = _number("lmbda", lmbda)
    if not 0 <= value < 1:
        raise SettingError(f"lmbda is {lmbda!r}, expected 0 <= lmbda < 1")
    return value


def check_lmbdas(lmbda: Any, count: int) -> tuple[float, ...]:
    """Return one λ per memory: λ_i ≥ 0 and Σ λ_i < 1; raise `SettingError` otherwise.

    Args:
        lmbda: a list or tuple of `count` numbers, or one number, which is divided equally.
        count: how many memories there are.
    """
    if isinstance(lmbda, list | tuple):
        lmbdas = tuple(check_lmbda(value) for value in each("lmbda", lmbda, count))
    else:
        lmbdas = (check_lmbda(lmbda) / count,) * count
    if math.fsum(lmbdas) >= 1:
        raise SettingError(f"lmbda is {lmbda!r}, expected a sum below 1: the rest is the model's")
    return lmbdas


def each(name: str, value: Any, count: int) -> tuple[Any, ...]:
    """One setting per memory: a list or tuple of `count`, or anything else for all alike."""
    if not isinstance(value, list | tuple):
        return (value,) * count
    if len(value) != count:
        raise SettingError(f"{name} has {len(value)} values for {count} memories: give {count}")
    return tuple(value)


def one_or_all(values: Sequence[Any]) -> Any:
    """The only value where there is one memory, else the tuple of all."""
    return values[0] if len(values) == 1 else tuple(values)


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise SettingError(f"{name} is {value!r}, expected a number") from error
