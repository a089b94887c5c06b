"""Choose an index by the number of entries, their dimension, and the memory at hand."""

from __future__ import annotations

import math
import os

EXACT_BELOW = 50_000
"""Entries up to which exact search is fast enough that an index would only lose."""
_KEYS_PER_CODE = 4
_SMALLEST_QUANTISED = 32


def choose(entries: int, dim: int, *, bytes_per_value: int = 2, memory: int | None = None) -> str:
    """The spec that `auto` stands for.

    Args:
        entries: N.
        dim: D.
        bytes_per_value: of the stored keys.
        memory: bytes the search may use; default: what the machine has available.

    Returns:
        `exact` for a small store. Else inverted lists, entries coded by 4-bit product quantisation
        of 4 dimensions each (N·D/8 bytes), candidates refined from the stored keys. Where the
        stored keys do not fit in memory, refining would read them from the disk for every query:
        then 8-bit codes (N·D/4 bytes), or 4-bit ones where those do not fit either.
    """
    if entries <= EXACT_BELOW:
        return "exact"
    memory = available_memory() if memory is None else memory
    lists = 2 ** max(4, math.floor(math.log2(math.sqrt(entries))))
    if dim < _SMALLEST_QUANTISED:
        return f"IVF{lists},SQ8"
    parts = -(-dim // _KEYS_PER_CODE)
    pad = "" if dim % _KEYS_PER_CODE == 0 else f"Pad{parts * _KEYS_PER_CODE},"
    if entries * dim * bytes_per_value <= memory:
        return f"{pad}IVF{lists},PQ{parts}x4fs,Refine(keys)"
    if entries * (parts + 8) <= memory:
        return f"{pad}IVF{lists},PQ{parts}"
    return f"{pad}IVF{lists},PQ{parts}x4fs"


def available_memory() -> int:
    """Bytes of memory that are free or hold only file caches; physical memory where unknown."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 8 << 30
