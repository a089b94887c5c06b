"""A head's product against float64, for few states and for many."""

import pytest
import torch

from knnlm_hf import MultiEmbeddingHead
from knnlm_hf.memory import product
from knnlm_hf.memory.product import is_quick, times_rows


@pytest.fixture(params=[True, False], ids=["in blocks", "as usual"], autouse=True)
def usual_is_slow(request, monkeypatch):
    """Both ways on every machine."""
    monkeypatch.setattr(product, "usual_is_slow", lambda: request.param)
    return request.param


@pytest.mark.parametrize(
    ("name", "has_mkl", "slow"),
    [("AMD EPYC", True, True), ("AMD EPYC", False, False), ("Intel Xeon", True, False)],
)
def test_whose_cpu_it_is(name, has_mkl, slow, monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: has_mkl)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name}, raising=False)
    assert product._is_amd_with_mkl() is slow


def test_a_torch_that_does_not_name_it(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not product._is_amd_with_mkl()


def test_few_states_in_float32_are_quick_where_the_usual_way_is_not(usual_is_slow):
    assert is_quick(1, torch.ones(16, 3)) is is_quick(8, torch.ones(16, 3)) is usual_is_slow
    assert not is_quick(9, torch.ones(16, 3))
    assert not is_quick(1, torch.ones(15, 3))
    assert not is_quick(1, torch.ones(16, 3).double())


def test_hand_worked_product():
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
    assert times_rows(torch.tensor([[5.0, 7.0]]), rows).tolist() == [[5.0, 14.0, 22.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("queries", [0, 1, 2, 8, 9, 20])
@pytest.mark.parametrize("number", [1, 15, 16, 31, 37, 48])
def test_against_float64(queries, number, dtype):
    generator = torch.Generator().manual_seed(queries)
    hidden = torch.randn(queries, 13, generator=generator).to(dtype)
    rows = torch.randn(number, 13, generator=generator).to(dtype)
    found = times_rows(hidden, rows)
    assert (found.shape, found.dtype) == ((queries, number), dtype)
    expected = hidden.double() @ rows.double().T
    tolerance = {"rtol": 20 * torch.finfo(dtype).eps, "atol": 20 * torch.finfo(dtype).eps}
    torch.testing.assert_close(found.double(), expected, **tolerance)


@pytest.mark.parametrize("queries", [1, 3])
def test_gradients(queries):
    """Of few states too, in float32; 37 rows are 16 blocks and a rest."""
    hidden = torch.randn(queries, 5, requires_grad=True)
    rows = torch.randn(37, 5, requires_grad=True)
    slope = torch.randn(queries, 37)
    times_rows(hidden, rows).backward(slope)
    torch.testing.assert_close(hidden.grad, slope @ rows.detach())
    torch.testing.assert_close(rows.grad, slope.T @ hidden.detach())


@pytest.mark.parametrize("queries", [1, 3])
def test_rows_that_do_not_lie_one_behind_the_other(queries):
    hidden, wide = torch.randn(queries, 5), torch.randn(5, 80)
    for rows in (wide.T, wide.T[::2], wide.reshape(80, 5)[::2]):
        torch.testing.assert_close(times_rows(hidden, rows), hidden @ rows.T)


@torch.no_grad()
@pytest.mark.parametrize("states", [1, 3])
def test_a_head_compiles_whole(states):
    torch.compiler.reset()
    head, hidden = MultiEmbeddingHead(6, 20, n=2), torch.randn(states, 6)
    compiled = torch.compile(head.log_probs, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(hidden), head.log_probs(hidden))


@pytest.mark.parametrize("settings", [{"n": 1}, {"n": 3}, {"rows_per_token": [1, 0, 3, 2] * 5}])
def test_a_head_says_the_same_of_one_state_as_of_many(settings):
    torch.manual_seed(0)
    head = MultiEmbeddingHead(6, 20, temperature=0.7, bias=True, **settings)
    hidden, tokens = torch.randn(30, 6), torch.arange(30) % 20
    whole = head.log_probs(hidden)
    single = torch.cat([head.log_probs(row[None]) for row in hidden])
    torch.testing.assert_close(single, whole)
    pairs = zip(hidden, tokens, strict=True)
    one_by_one = [head.token_log_probs(state[None], token[None]) for state, token in pairs]
    torch.testing.assert_close(torch.cat(one_by_one), head.token_log_probs(hidden, tokens))
