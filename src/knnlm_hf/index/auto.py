"""Choose an index by the number of entries, their dimension, and the memory at hand."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

from knnlm_hf.types import Metric

EXACT_BELOW = 50_000
"""Entries up to which exact search is fast enough that an index would only lose."""
_SMALLEST_QUANTISED = 32
_MOST_ERROR = 0.1
"""Of a distance. An error of 0.05 costs 0.2 % of the perplexity, see `docs/choose-an-index.md`."""
_ID_BYTES = 8
_FEWEST_CODED = 1024
"""Centres of lists from which their codes can be learnt."""


def choose(entries: int, dim: int, metric: Metric = "l2", *, memory: int | None = None) -> str:
    """The spec that `auto` stands for.

    Args:
        entries: N.
        dim: D.
        metric: `l2` or `ip`.
        memory: bytes the search may use; default: what the machine has available.

    Returns:
        `exact` for a small store. Else inverted lists, entries coded by 4 bits per dimension, from
        which FAISS's fast scan takes candidates and similarities at once: N·(D/2 + 8) bytes, and no
        key is read. Keys are rotated at random first. Distances stay what they are, while all
        directions come to matter alike: a few of large variance, as models have, would leave the
        others too few of the 255 steps of a scan's tables. With l2 the lists' centres are coded
        alike, so that there can be twice as many: a query passes fewer entries on its way to the
        nearest. (With ip a coded scan finds no list for a key of zeros, which would be lost.)

        Where that does not fit in memory, 4 bits for two dimensions, else for four. Where an index
        built so errs too much, the stored keys refine it, see `must_refine`.
    """
    if entries <= EXACT_BELOW:
        return "exact"
    room = available_memory() if memory is None else memory

    def fits(codes: int) -> bool:
        return entries * (-(-codes // 2) + _ID_BYTES) <= room

    magnitude = round(math.log2(math.sqrt(entries)))
    if dim < _SMALLEST_QUANTISED:
        return f"IVF{2**magnitude},SQ8"
    if fits(dim):
        if metric == "ip":
            return f"RR{dim},IVF{2**magnitude},PQ{dim}x4fs"
        lists = max(_FEWEST_CODED, 2 ** (magnitude + 1))
        return f"RR{dim},IVF{lists}(PQ{dim}x4fs),PQ{dim}x4fs"
    # subtle: `r` codes what is left of a key after its list's centre, which halves the error of
    # coarse codes and takes a table per list and query. The centres must not be coded then.
    each = 2 if fits(-(-dim // 2)) else 4
    codes = -(-dim // each)
    return f"RR{codes * each},IVF{2**magnitude},PQ{codes}x4fsr"


def must_refine(
    self_check: Mapping[str, float], key_bytes: int, *, memory: int | None = None
) -> bool:
    """Whether the codes that `auto` chose turned out too coarse, and the stored keys can help.

    So it is where neighbours are far closer than what the keys as a whole spread over.

    Args:
        self_check: of the index, see `self_check`.
        key_bytes: of the stored keys, which refining reads.
        memory: as of `choose`.
    """
    memory = available_memory() if memory is None else memory
    return self_check.get("distance_error", 0.0) > _MOST_ERROR and key_bytes <= memory


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
