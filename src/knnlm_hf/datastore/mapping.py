"""Several files as one array: their pages mapped one behind the other, nothing copied.

A gather of random rows from one array is a single call; from many shards it is a search, a sort
and a call for each. So the keys of all shards are mapped next to each other where the system can:
on POSIX, with data that begins and (but for the last file) ends on a page boundary.

They are mapped so that the system can use huge pages, each with one entry of the processor's short
list of page addresses instead of 512: a gather of random rows would look up one for every row. A
file has them where it is written in whole huge pages, or read for the first time by `prefetch`.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_PROT_NONE, _MAP_FIXED, _MAP_ANONYMOUS = 0, 0x10, 0x20
_MADV_HUGEPAGE, _MADV_POPULATE_READ = 14, 22

HUGE_PAGE = 1 << 21
"""Bytes, of x86-64 and of most others; where it is another size, pages stay small."""


class Region(NamedTuple):
    """Consecutive bytes of a file."""

    path: Path
    offset: int
    bytes: int


def joined(regions: Sequence[Region], dtype: Any) -> npt.NDArray[Any] | None:
    """The regions as one flat array, copy-on-write, or None where that cannot be had.

    The files must not be truncated while the array lives, as with any mapping.
    """
    page = mmap.PAGESIZE
    on_pages = all(region.offset % page == 0 for region in regions)
    on_pages &= all(region.bytes % page == 0 for region in regions[:-1])
    if sys.platform != "linux" or not on_pages or not any(r.bytes for r in regions):
        return None
    try:
        return np.asarray(_Joined(regions, dtype))
    except OSError:
        return None


class _Joined:
    """Owns the address range; numpy keeps it alive as the base of the array."""

    def __init__(self, regions: Sequence[Region], dtype: Any) -> None:
        size = sum(region.bytes for region in regions)
        self._size = size + HUGE_PAGE
        self._address = _map(None, self._size, _PROT_NONE, _MAP_ANONYMOUS, -1, 0)
        # As far from a huge page's beginning in memory as in the first file.
        start = at = self._address + (regions[0].offset - self._address) % HUGE_PAGE
        for region in regions:
            file = os.open(region.path, os.O_RDONLY)
            try:
                protection = mmap.PROT_READ | mmap.PROT_WRITE
                _map(at, region.bytes, protection, _MAP_FIXED, file, region.offset)
            finally:
                os.close(file)
            at += region.bytes
        kind = np.dtype(dtype)
        self.__array_interface__ = {
            "version": 3,
            "typestr": kind.str,
            "shape": (size // kind.itemsize,),
            "data": (start, False),
        }

    def __del__(self) -> None:
        if getattr(self, "_address", None):
            _libc().munmap(self._address, self._size)


def prefetch(array: npt.NDArray[Any]) -> None:
    """Bring a mapped array's pages in now, in order, rather than one by one at first touch.

    Advice only: where the system does not know it, nothing happens.
    """
    if sys.platform != "linux" or array.nbytes == 0:
        return
    start = array.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    for advice in (_MADV_HUGEPAGE, _MADV_POPULATE_READ):
        _libc().madvise(start, array.ctypes.data + array.nbytes - start, advice)


def _map(at: int | None, size: int, protection: int, flags: int, file: int, offset: int) -> int:
    found = _libc().mmap(at, size, protection, mmap.MAP_PRIVATE | flags, file, offset)
    if found in (None, ctypes.c_void_p(-1).value):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return int(found)


def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.restype = address
    libc.mmap.argtypes = [address, size, number, number, number, ctypes.c_long]
    libc.munmap.argtypes = [address, size]
    libc.madvise.argtypes = [address, size, number]
    return libc
