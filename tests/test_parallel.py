"""Blocks of work over threads: every row once, errors reach the caller, settings stay."""

import threading

import pytest
import torch

from knnlm_hf.parallel import over_blocks


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


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
