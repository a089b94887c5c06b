"""Blocks of work over threads: every row once, errors reach the caller, settings stay."""

import gc
import subprocess
import sys
import threading
import weakref
from contextvars import ContextVar

import pytest
import torch

from knnlm_hf.parallel import over_blocks, pool, two_at_a_time


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("size", [3, 9])
def test_in_inference_mode_the_caller_s_tensors_can_be_filled(three_threads, size):
    with torch.inference_mode():
        rows = torch.zeros(9)
        over_blocks(lambda part: rows[part].add_(1), 9, size)
        assert torch.equal(rows, torch.ones(9))
        assert torch.is_inference_mode_enabled()
    seen = []
    with torch.enable_grad():
        over_blocks(lambda part: seen.append(torch.is_grad_enabled()), 9, size)
        assert torch.is_grad_enabled()
    assert not any(seen)


@pytest.mark.parametrize(("total", "size"), [(0, 4), (1, 4), (10, 3), (12, 3), (100, 1)])
def test_every_row_once(three_threads, total, size):
    rows = torch.zeros(total)
    workers = set()

    def work(part):
        assert part.stop - part.start <= size
        rows[part] += 1
        workers.add((threading.current_thread().name, torch.get_num_threads()))

    over_blocks(work, total, size)
    assert torch.equal(rows, torch.ones(total))
    if total > size:
        assert all(name.startswith("knnlm-hf") and threads == 1 for name, threads in workers)
    assert torch.get_num_threads() == 3


def test_an_error_reaches_the_caller(three_threads):
    def work(part):
        if part.start == 6:
            raise ValueError("row 6")

    with pytest.raises(ValueError, match="row 6"):
        over_blocks(work, 9, 3)


def test_one_thread_works_in_the_caller():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    names = []
    over_blocks(lambda part: names.append(threading.current_thread().name), 9, 3)
    torch.set_num_threads(before)
    assert set(names) == {threading.current_thread().name}


def test_a_task_gives_its_result_as_often_as_asked():
    task = pool.submit(divmod, 7, 2)
    assert [task.result(), task.result()] == [(3, 1), (3, 1)]


def test_a_helper_thread_takes_no_gradients():
    weight = torch.ones(2, requires_grad=True)
    assert not pool.submit(torch.mul, weight, 2).result().requires_grad
    assert (weight * 2).requires_grad


def test_a_task_raises_what_its_work_raised_and_the_thread_goes_on():
    for _ in range(2 * pool.size):
        with pytest.raises(ZeroDivisionError):
            pool.submit(divmod, 7, 0).result()
    assert pool.submit(divmod, 7, 2).result() == (3, 1)


def test_nothing_of_a_task_is_kept_once_it_is_done():
    states = torch.zeros(3)
    gone = weakref.ref(states)
    for _ in range(pool.size):
        assert pool.submit(torch.sum, states).result() == 0
    del states
    gc.collect()
    assert gone() is None


UNFINISHED = """
import time
from knnlm_hf.parallel import pool
pool.submit(lambda: (time.sleep(0.3), print("finished")))
"""


def test_what_is_at_work_is_finished_before_the_interpreter_ends():
    ended = subprocess.run(
        [sys.executable, "-c", UNFINISHED], check=True, capture_output=True, text=True, timeout=120
    )
    assert (ended.stdout.strip(), ended.stderr) == ("finished", "")


# --- two at a time ----------------------------------------------------------------------------

WHO: ContextVar[str] = ContextVar("who", default="nobody")


@pytest.mark.parametrize("count", [0, 1, 2, 3, 20])
def test_results_in_order_from_two_threads_with_half_of_the_cores(three_threads, count):
    seen, both = set(), threading.Barrier(2)

    def work(item):
        if count == 20 and item in (1, 2):
            both.wait(timeout=30)  # passes only where both are worked on at once
        seen.add((threading.current_thread().name, torch.get_num_threads(), WHO.get()))
        return 10 * item

    token = WHO.set("the caller")
    assert list(two_at_a_time(work, range(count))) == [10 * item for item in range(count)]
    WHO.reset(token)
    here = (threading.current_thread().name, 3, "the caller")
    assert (here in seen) == (count > 0)
    others = seen - {here}
    assert len(others) <= 2
    assert (len(others) == 2) == (count == 20)
    assert all(threads == 1 and who == "the caller" for _, threads, who in others)
    assert torch.get_num_threads() == 3


def test_no_more_is_taken_than_is_worked_on(three_threads):
    taken = []

    def items():
        for item in range(20):
            taken.append(item)
            yield item

    results = two_at_a_time(lambda item: item, items())
    for done in range(8):
        assert next(results) == done
        assert len(taken) <= done + 4
    results.close()
    assert len(taken) < 13


def test_an_error_of_one_ends_all(three_threads):
    def work(item):
        if item == 3:
            raise ValueError("item 3")
        return item

    results = two_at_a_time(work, range(1_000_000))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="item 3"):
        next(results)
