"""Blocks of work on several threads, each keeping its torch operations to itself.

torch spreads one operation over all cores and numpy runs on one. For many operations of a few
megabytes it is better to give each thread blocks of its own: both release the interpreter's lock
while they compute.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Thread

import torch


def _use_one_core() -> None:
    """Keep this thread's torch operations on this thread."""
    others = torch.get_num_threads()
    torch.set_num_threads(1)
    # subtle: that is this thread's own setting, but also what threads begun later start with.
    restoring = Thread(target=torch.set_num_threads, args=(others,))
    restoring.start()
    restoring.join()


pool = ThreadPoolExecutor(
    max_workers=max(4, os.cpu_count() or 1),
    thread_name_prefix="knnlm-hf",
    initializer=_use_one_core,
)
"""Threads with one core each."""


def over_blocks(work: Callable[[slice], None], total: int, size: int) -> None:
    """Call `work` on consecutive slices of range(total), on as many threads as torch uses here.

    Args:
        work: fills its own part of something, without gradients; slices come in any order.
        total: how many rows there are.
        size: rows of a slice, the last one excepted.
    """
    slices = [slice(start, min(start + size, total)) for start in range(0, total, size)]
    threads = min(torch.get_num_threads(), len(slices))

    @torch.no_grad()
    def share(first: int) -> None:
        for part in slices[first::threads]:
            work(part)

    if threads == 1:
        share(0)
        return
    for done in [pool.submit(share, first) for first in range(threads)]:
        done.result()
