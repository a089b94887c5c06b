"""MLPMemory against loops in float64, and autograd's own gradients."""

import math

import numpy as np
import pytest
import torch

from knnlm_hf.errors import KNNLMError, SettingError
from knnlm_hf.memory.mlp import MLPMemory, width_within


def array(tensor):
    return tensor.detach().double().numpy()


def norm(x, layer):
    scaled = (x - x.mean()) / math.sqrt(((x - x.mean()) ** 2).mean() + layer.eps)
    return scaled * array(layer.weight) + array(layer.bias)


def gelu(x):
    return np.array([value * 0.5 * (1 + math.erf(value / math.sqrt(2))) for value in x])


def loop(head, hidden):
    result = np.zeros((len(hidden), head.vocab_size))
    for q, x in enumerate(array(hidden)):
        for block in head.blocks:
            inner = gelu(array(block.up.weight) @ norm(x, block.norm) + array(block.up.bias))
            x = x + array(block.down.weight) @ inner + array(block.down.bias)
        scores = np.exp(array(head.weight) @ norm(x, head.norm))
        result[q] = scores / scores.sum()
    return result


def made(dtype=torch.float32, **options):
    torch.manual_seed(0)
    head = MLPMemory(5, 7, **{"layers": 2, "width": 6, **options}).to(dtype)
    for parameter in head.parameters():
        parameter.data.normal_()
    return head


def test_one_unit_by_hand():
    head = MLPMemory(2, 2, layers=1, width=1)
    block = head.blocks[0]
    block.up.weight.data = torch.tensor([[1.0, 0.0]])
    block.down.weight.data = torch.tensor([[0.0], [10.0]])
    head.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    # (2, 0) normalises to (1, −1); gelu(1) = 0.8413; (2, 8.413) normalises to (−1, 1).
    block.up.bias.data.zero_()
    got = head.log_probs(torch.tensor([[2.0, 0.0]])).exp()
    expected = 1 / (1 + math.exp(-2))
    assert got[0, 1].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("layers", [1, 3])
def test_against_the_loop(layers):
    head = made(layers=layers)
    hidden = torch.randn(11, 5)
    got = head.log_probs(hidden)
    np.testing.assert_allclose(array(got.exp()), loop(head, hidden), rtol=1e-4, atol=1e-7)
    tokens = torch.arange(11) % 7
    one = head.token_log_probs(hidden, tokens)
    torch.testing.assert_close(one, got[torch.arange(11), tokens])
    assert head(hidden, tokens).item() == pytest.approx(-one.mean().item(), rel=1e-6)


@pytest.mark.parametrize("soft", [False, True])
def test_gradients_flow_through_the_layers(soft):
    head = made(torch.float64)
    tokens = torch.randint(7, (9, 4) if soft else (9,))
    weights = torch.rand(9, 4, dtype=torch.float64) if soft else None

    def plain(states, tokens, weights):
        log_probs = head.log_probs(states)
        if weights is None:
            return -log_probs.gather(1, tokens[:, None]).mean()
        return -(weights * log_probs.gather(1, tokens)).sum(1).mean()

    hidden, results = torch.randn(9, 5, dtype=torch.float64), []
    for function in (head, plain):
        head.zero_grad()
        states = hidden.clone().requires_grad_()
        loss = function(states, tokens, weights)
        loss.backward()
        results.append([loss.detach(), states.grad, *(p.grad.clone() for p in head.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradcheck_in_float64():
    head = made(torch.float64)
    hidden = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    names, values = zip(*head.named_parameters(), strict=True)

    def loss(states, *parameters):
        replaced = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(head, replaced, (states, torch.tensor([0, 6, 2, 2])))

    assert torch.autograd.gradcheck(loss, (hidden, *values))


def test_it_begins_as_rows_over_the_normalised_state():
    head = MLPMemory(5, 7, layers=3)
    hidden = torch.randn(4, 5)
    expected = (torch.nn.functional.layer_norm(hidden, (5,)) @ head.weight.T).log_softmax(-1)
    torch.testing.assert_close(head.log_probs(hidden), expected)


def test_dropout_in_training_only():
    head = made(dropout=0.5)
    hidden, tokens = torch.randn(8, 5), torch.randint(7, (8,))
    assert head(hidden, tokens) != head(hidden, tokens)
    head.eval()
    assert head(hidden, tokens) == head(hidden, tokens)


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("budget", [1.5, 2, 4.0])
def test_the_budget_holds_and_is_used(layers, budget):
    head = MLPMemory(16, 300, layers=layers, budget=budget)
    count = sum(parameter.numel() for parameter in head.parameters())
    assert count <= budget * 300 * 16
    step = 8 if head.width >= 8 else 1
    wider = MLPMemory(16, 300, layers=layers, width=head.width + step)
    assert sum(parameter.numel() for parameter in wider.parameters()) > budget * 300 * 16
    assert width_within(budget, 16, 300, layers) == head.width
    assert head.settings()["width"] == head.width


def test_bad_input():
    for options in (
        {"layers": 0},
        {"width": 0},
        {"dropout": 1},
        {"dropout": -0.1},
        {"dropout": "x"},
    ):
        with pytest.raises(SettingError, match=next(iter(options))):
            MLPMemory(4, 5, **options)
    with pytest.raises(SettingError, match="give one"):
        MLPMemory(4, 5, width=3, budget=2)
    for budget in (1, 0, -1, math.nan, "2"):
        with pytest.raises(SettingError, match=r"expected 1\.\d+ or more"):
            MLPMemory(16, 300, budget=budget)
    with pytest.raises(KNNLMError, match="3-d"):
        MLPMemory(4, 5).log_probs(torch.zeros(1, 3))
