"""MultiEmbeddingHead and its loss against loops in float64, and autograd's own gradients."""

import math

import numpy as np
import pytest
import tiny
import torch

from knnlm_hf import KNNLMForCausalLM, MultiEmbeddingHead
from knnlm_hf.errors import KNNLMError, SettingError
from knnlm_hf.memory import Memory
from knnlm_hf.memory import head_loss as loss_module
from knnlm_hf.memory.head_loss import head_loss
from knnlm_hf.memory.multi_embedding import rows_by_frequency, rows_by_loss

RAGGED = [1, 3, 0, 2, 5, 1, 1]


def loop(head, hidden):
    """p(w|h), row by row."""
    weight = head.weight.detach().double().numpy()
    bias = np.zeros(len(weight)) if head.bias is None else head.bias.detach().double().numpy()
    result = np.zeros((len(hidden), head.vocab_size))
    for q, h in enumerate(hidden.double().numpy()):
        scores = [math.exp(h @ w / head.temperature + b) for w, b in zip(weight, bias, strict=True)]
        for token, score in zip(head.row_tokens.tolist(), scores, strict=True):
            result[q, token] += score / sum(scores)
    return result


def test_two_rows_of_one_token_are_summed():
    head = MultiEmbeddingHead(1, 2, n=2)
    head.weight.data = torch.tensor([[0.0], [math.log(2)], [math.log(3)], [0.0]])
    # exp(h·w) at h = 1: token 0 has 1 + 2, token 1 has 3 + 1.
    assert torch.allclose(head.log_probs(torch.ones(1, 1)).exp(), torch.tensor([[3 / 7, 4 / 7]]))


@pytest.mark.parametrize("rows", [None, RAGGED])
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize(("temperature", "bias"), [(1.0, False), (0.5, True)])
def test_against_the_loop(rows, n, temperature, bias):
    torch.manual_seed(n)
    head = MultiEmbeddingHead(5, 7, n, rows_per_token=rows, temperature=temperature, bias=bias)
    if bias:
        head.bias.data.normal_()
    hidden = torch.randn(11, 5)
    expected = loop(head, hidden)
    got = head.log_probs(hidden)
    np.testing.assert_allclose(got.detach().exp().numpy(), expected, rtol=1e-4, atol=1e-7)
    assert ((got == -math.inf).numpy() == (expected == 0)).all()
    tokens = torch.arange(11) % 7
    one = head.token_log_probs(hidden, tokens)
    torch.testing.assert_close(one, got[torch.arange(11), tokens])
    shaped = head.log_probs(hidden[:10].reshape(2, 5, 5))
    torch.testing.assert_close(shaped.reshape(10, 7), got[:10])


def plain_loss(hidden, rows, bias, target_rows):
    logits = hidden @ rows.T if bias is None else hidden @ rows.T + bias
    own = logits.gather(1, target_rows.clamp(min=0)).masked_fill(target_rows < 0, -math.inf)
    return (logits.logsumexp(1) - own.logsumexp(1)).mean()


def blocks(monkeypatch, few, many):
    """So many queries in a block of the softmax, and of the gradients."""
    for name, value in (("_FEWEST_SOFTMAX", few), ("_FEWEST_SLOPES", many)):
        monkeypatch.setattr(loss_module, name, value)
    for name in ("_SOFTMAX_LOGITS", "_SLOPES"):
        monkeypatch.setattr(loss_module, name, 1)


@pytest.mark.parametrize("chunk", [(1, 1), (2, 5), (3, 4), (64, 256)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_loss_and_its_gradients_against_autograd(chunk, with_bias, monkeypatch):
    blocks(monkeypatch, *chunk)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 6, generator=generator)
    rows = torch.randn(13, 6, generator=generator)
    bias = torch.randn(13, generator=generator) if with_bias else None
    targets = torch.tensor([[0, 1, -1], [12, -1, -1], [3, 4, 5]]).repeat(3, 1)
    results = []
    for function in (head_loss, plain_loss):
        inputs = [None if x is None else x.clone().requires_grad_() for x in (hidden, rows, bias)]
        loss = 3 * function(*inputs, targets)
        loss.backward()
        results.append([loss.detach(), *(x.grad for x in inputs if x is not None)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [(2, 5), (64, 256)])
def test_soft_targets_are_the_weighted_sum_of_hard_ones(chunk, monkeypatch):
    blocks(monkeypatch, *chunk)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 6, generator=generator)
    rows = torch.randn(13, 6, generator=generator)
    bias = torch.randn(13, generator=generator)
    targets = torch.tensor([[[0, 1, -1], [12, -1, -1]], [[3, 4, 5], [3, 4, 5]]])[
        [0, 1, 0, 1, 0, 1, 0]
    ]
    weights = torch.rand(7, 2, generator=generator)
    weights[2, 1] = 0
    results = []
    for soft in (True, False):
        inputs = [x.clone().requires_grad_() for x in (hidden, rows, bias)]
        if soft:
            loss = head_loss(*inputs, targets, weights)
        else:
            parts = [
                weights[q, t] * plain_loss(inputs[0][q : q + 1], *inputs[1:], targets[q, t][None])
                for q in range(7)
                for t in range(2)
            ]
            loss = torch.stack(parts).sum() / 7
        loss.backward()
        results.append([loss.detach(), *(x.grad for x in inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_soft_targets_of_a_head_by_hand():
    head = MultiEmbeddingHead(1, 2, n=1)
    head.weight.data = torch.tensor([[0.0], [math.log(3)]])
    # p = (1/4, 3/4); the teacher says (1/2, 1/2).
    loss = head(torch.ones(1, 1), torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]))
    assert loss.item() == pytest.approx(-0.5 * math.log(1 / 4) - 0.5 * math.log(3 / 4))


def test_gradcheck_in_float64():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(6, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[0, 1], [5, -1], [2, 3], [4, -1]])
    assert torch.autograd.gradcheck(lambda *x: head_loss(*x, targets), (hidden, rows, bias))
    weights = torch.tensor([[0.2, 0.5], [1.0, 0.0], [0.3, 0.3], [0.9, 0.1]], dtype=torch.float64)
    soft = torch.stack([targets, targets.roll(1, 0)], 1)
    assert torch.autograd.gradcheck(lambda *x: head_loss(*x, soft, weights), (hidden, rows, bias))


def test_a_hopeless_token_still_has_a_gradient():
    # A probability of e^-80 is far below any clamp; its gradient must be 1, not 0.
    rows = torch.tensor([[80.0], [0.0]], requires_grad=True)
    head_loss(torch.ones(1, 1), rows, None, torch.tensor([[1]])).backward()
    assert rows.grad[:, 0].tolist() == pytest.approx([1.0, -1.0])


@pytest.mark.parametrize("n", [1, 2])
def test_no_state_at_all(n):
    head = MultiEmbeddingHead(4, 5, n=n)
    assert head.log_probs(torch.zeros(0, 4)).shape == (0, 5)
    assert head.token_log_probs(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_bfloat16_computes_in_it_and_sums_in_float32():
    torch.manual_seed(0)
    head = MultiEmbeddingHead(32, 50, n=2)
    hidden, tokens = torch.randn(64, 32), torch.randint(50, (64,))
    exact = head(hidden, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        half = head(hidden, tokens)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(exact.item(), rel=2e-2)
    assert half.item() != exact.item()
    assert head.bfloat16().log_probs(hidden).dtype == torch.float32


def test_it_is_a_memory_for_the_wrapper():
    model = tiny.gpt2()
    head = MultiEmbeddingHead(24, tiny.VOCAB, n=2)
    assert isinstance(head, Memory)
    knn = KNNLMForCausalLM(model, head, lmbda=0.3)
    assert set(knn.state_dict()) == set(model.state_dict())
    ids = torch.tensor([[5, 6, 7]])
    kept = []
    handle = model.transformer.h[-1].mlp.register_forward_pre_hook(lambda m, x: kept.append(x[0]))
    base = model(ids).logits.softmax(-1)
    handle.remove()
    expected = 0.7 * base[0].detach().double().numpy() + 0.3 * loop(head, kept[0][0].detach())
    got = knn(ids).logits[0].exp().detach().numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-4)
    assert knn.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 6)


def test_rows_by_frequency_and_by_loss():
    assert rows_by_frequency([0, 1, 9, 10, 99, 100, 1000]).tolist() == [1, 1, 1, 1, 1, 2, 3]
    assert rows_by_frequency([8, 7, 1], base=2).tolist() == [3, 2, 1]
    assert rows_by_loss([0.0, 1.0, 3.0], rows=7).tolist() == [1, 2, 4]
    assert rows_by_loss([1.0, 1.0, 1.0], rows=5).tolist() == [2, 2, 1]
    assert int(rows_by_loss(torch.rand(100), rows=333).sum()) == 333


def test_bad_input():
    for options in ({"n": 0}, {"n": -1}, {"n": 1.5}, {"temperature": 0}):
        with pytest.raises(SettingError):
            MultiEmbeddingHead(4, 5, **options)
    for rows in ([1, 2], [1, 1, 1, 1, -1], [0.5] * 5, [0] * 5):
        with pytest.raises(SettingError, match="rows_per_token"):
            MultiEmbeddingHead(4, 5, rows_per_token=rows)
    with pytest.raises(SettingError, match="at least one"):
        rows_by_loss([1.0, 1.0], rows=1)
    head = MultiEmbeddingHead(4, 5, rows_per_token=[1, 0, 1, 1, 1])
    with pytest.raises(KNNLMError, match="3-d"):
        head.log_probs(torch.zeros(1, 3))
    with pytest.raises(KNNLMError, match="token 1 has no row"):
        head(torch.zeros(2, 4), torch.tensor([0, 1]))
    with pytest.raises(KNNLMError, match="one per hidden state"):
        head.token_log_probs(torch.zeros(2, 4), torch.tensor([0]))
    assert head.token_log_probs(torch.zeros(1, 4), torch.tensor([1])).item() == -math.inf
