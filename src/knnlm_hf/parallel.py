"""Blocks of work on several threads, each keeping its torch operations to itself.

torch spreads one operation over all cores and numpy runs on one. For many operations of a few
megabytes it is better to give each thread blocks of its own: both release the interpreter's lock
while they compute.
"""

from __future__ import annotations

import atexit
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from itertools import islice
from queue import SimpleQueue
from threading import Lock, Thread, local
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

# subtle: torch.set_num_threads is a thread's own setting, but also what threads begun later start
# with. One that begins while another thread spares a core would have one too few for good.
_seen = local()
_lock, _starting = Lock(), Lock()
_sparing = 0
"""How many threads spare a core at the moment."""
_usual = 0
"""What the thread has otherwise that spared one last."""


def threads_here() -> int:
    """How many threads torch uses in this one; mended where it began while one was spared."""
    count = torch.get_num_threads()
    if not hasattr(_seen, "before"):
        _seen.before = True
        if count + 1 == _usual and (_sparing or _in_a_new_thread(torch.get_num_threads) == _usual):
            count = _usual
            torch.set_num_threads(count)
    return count


def spare_a_core(threads: int) -> None:
    """Let torch use one thread less here than `threads`, until `spare_none`."""
    global _sparing, _usual
    with _lock:
        _sparing, _usual = _sparing + 1, threads
    torch.set_num_threads(max(1, threads - 1))


def spare_none(threads: int) -> None:
    """Let torch use `threads` threads here again."""
    global _sparing
    torch.set_num_threads(threads)
    with _lock:
        _sparing -= 1


def _use_cores(count: int, others: int | None = None) -> None:
    """Let torch use so many threads in this one, and in later ones `others`: as many as before."""
    with _starting:  # else a second one would take this one's count for everybody's
        here = threads_here()  # also has torch set this thread up, which would undo the next line
        torch.set_num_threads(count)
        _in_a_new_thread(lambda: torch.set_num_threads(others or here))


def _in_a_new_thread(work: Callable[[], Any]) -> Any:
    answers: list[Any] = []
    thread = Thread(target=lambda: answers.append(work()))
    thread.start()
    thread.join()
    return answers[0]


class Task(Generic[R]):
    """Work that was handed over."""

    def __init__(self, work: Callable[..., R], args: tuple[Any, ...]) -> None:
        self._work, self._args = work, args
        self._value: R
        self._error: BaseException | None = None
        self._is_done = Lock()
        self._is_done.acquire()

    def run(self) -> None:
        """Do it, in the thread that took it."""
        try:
            self._value = self._work(*self._args)
        except BaseException as error:
            self._error = error
        del self._work, self._args
        self._is_done.release()

    def result(self) -> R:
        """What it returned, or raises what it raised, as soon as it is done."""
        with self._is_done:
            if self._error is not None:
                raise self._error
            return self._value


HandOver = Callable[..., Task[Any]]
"""hand_over(work, *args): has another thread call work(*args), as `Pool.submit` does."""


class Pool:
    """Threads with one core each and without gradients, begun when they are first needed.

    They are handed their work by one C call and wake the caller by another: `concurrent.futures`
    takes a dozen Python calls for it, which a step of generation waits for, 0.01 to 0.02 of its
    time.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._tasks: SimpleQueue[Task[Any] | None] = SimpleQueue()
        self._threads: list[Thread] = []
        atexit.register(self._end)

    def submit(self, work: Callable[..., R], *args: Any) -> Task[R]:
        """Have a thread call work(*args)."""
        if not self._threads:
            self._begin()
        task = Task(work, args)
        self._tasks.put(task)
        return task

    def _begin(self) -> None:
        with _lock:
            for number in range(len(self._threads), self.size):
                thread = Thread(target=self._serve, name=f"knnlm-hf_{number}", daemon=True)
                thread.start()
                self._threads.append(thread)

    def _serve(self) -> None:
        _use_cores(1)
        torch.set_grad_enabled(False)
        while (task := self._tasks.get()) is not None:
            task.run()
            del task  # what it holds is the caller's

    def _end(self) -> None:
        """Let what is at work finish: a thread inside torch must not outlive the interpreter."""
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()


pool = Pool(max(4, os.cpu_count() or 1))
"""Shared by all that have something to do beside the caller."""


def over_blocks(work: Callable[[slice], None], total: int, size: int) -> None:
    """Call `work` on consecutive slices of range(total), on as many threads as torch uses here.

    Args:
        work: fills its own part of something, without gradients; slices come in any order.
        total: how many rows there are.
        size: rows of a slice, the last one excepted.
    """
    slices = [slice(start, min(start + size, total)) for start in range(0, total, size)]
    threads = min(torch.get_num_threads(), len(slices))
    inferring = torch.is_inference_mode_enabled()  # then only a thread that is may fill its tensors

    def share(first: int) -> None:
        with torch.inference_mode(inferring), torch.no_grad():
            for part in slices[first::threads]:
                work(part)

    if threads == 1:
        share(0)
        return
    for done in [pool.submit(share, first) for first in range(threads)]:
        done.result()


def two_at_a_time(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """work(item) of every item, in order, two being worked on, each on half of the cores.

    The next ones are worked on while the consumer has one. The first is done alone, here: what is
    made on first use is then made once. Contexts (`contextvars`) are the caller's; what torch keeps
    for each thread, autocast and the like, is not.
    """
    rest = iter(items)
    for item in islice(rest, 1):
        yield work(item)
    threads = threads_here()
    cores = max(1, threads // 2)
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(2, "knnlm-hf-two", _use_cores, (cores, threads)) as two:
        try:
            for item in rest:
                waiting.append(two.submit(copy_context().run, work, item))
                if len(waiting) > 2:
                    yield waiting.popleft().result()
            for result in waiting:
                yield result.result()
        finally:
            two.shutdown(wait=True, cancel_futures=True)
