"""MixtureOfSoftmaxes against loops in float64, and autograd's own gradients."""

import math

import numpy as np
import pytest
import torch

from knnlm_hf.errors import KNNLMError, SettingError
from knnlm_hf.memory import head as head_module
from knnlm_hf.memory import head_loss as loss_module
from knnlm_hf.memory.mixture_of_softmaxes import MixtureOfSoftmaxes


def array(tensor):
    return tensor.detach().double().numpy()


def loop(head, hidden):
    """p(w|h), component by component."""
    weight, prior = array(head.weight), array(head.prior.weight)
    latent, bias = array(head.latent.weight), array(head.latent.bias)
    d = head.hidden_size
    result = np.zeros((len(hidden), head.vocab_size))
    for q, h in enumerate(array(hidden)):
        shares = np.exp(prior @ h)
        for k in range(head.components):
            rows = slice(k * d, (k + 1) * d)
            scores = np.exp(weight @ np.tanh(latent[rows] @ h + bias[rows]))
            result[q] += shares[k] / shares.sum() * scores / scores.sum()
    return result


def made(components=3, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    head = MixtureOfSoftmaxes(5, 7, components).to(dtype)
    for parameter in head.parameters():  # larger than at the start, so that components differ
        parameter.data.normal_()
    return head


def test_two_components_by_hand():
    head = MixtureOfSoftmaxes(1, 2, components=2)
    head.weight.data = torch.tensor([[0.0], [1.0]])
    head.latent.weight.data.zero_()
    # States ½ and −½, so that the odds of token 1 are e^½ and e^−½.
    head.latent.bias.data = torch.tensor([math.atanh(0.5), -math.atanh(0.5)])
    head.prior.weight.data = torch.tensor([[math.log(3)], [0.0]])  # 3 : 1 at h = 1
    up = math.exp(0.5) / (1 + math.exp(0.5))
    expected = 0.75 * up + 0.25 * (1 - up)
    assert head.log_probs(torch.ones(1, 1)).exp()[0, 1].item() == pytest.approx(expected)


@pytest.mark.parametrize("components", [1, 2, 5])
@pytest.mark.parametrize("chunk", [1, 50, 1 << 24])
def test_against_the_loop(components, chunk, monkeypatch):
    monkeypatch.setattr(head_module, "_CHUNK_ELEMENTS", chunk)
    head = made(components)
    hidden = torch.randn(11, 5)
    expected = loop(head, hidden)
    got = head.log_probs(hidden)
    np.testing.assert_allclose(array(got.exp()), expected, rtol=1e-4, atol=1e-7)
    tokens = torch.arange(11) % 7
    one = head.token_log_probs(hidden, tokens)
    torch.testing.assert_close(one, got[torch.arange(11), tokens])
    assert head(hidden, tokens).item() == pytest.approx(-one.mean().item(), rel=1e-6)
    with torch.no_grad():
        assert head(hidden, tokens).item() == pytest.approx(-one.mean().item(), rel=1e-6)
    shaped = head.log_probs(hidden[:10].reshape(2, 5, 5))
    torch.testing.assert_close(shaped.reshape(10, 7), got[:10])
    assert head.log_probs(hidden[:0]).shape == (0, 7)


def test_one_component_is_one_softmax():
    head = made(1)
    hidden = torch.randn(4, 5)
    expected = (torch.tanh(head.latent(hidden)) @ head.weight.T).log_softmax(-1)
    torch.testing.assert_close(head.log_probs(hidden), expected)


def plain(head, hidden, tokens, weights=None):
    """The loss by autograd, with all logits."""
    states = torch.tanh(head.latent(hidden)).view(len(hidden), head.components, -1)
    parts = head.prior(hidden).softmax(-1)[..., None] * (states @ head.weight.T).softmax(-1)
    log_probs = parts.sum(1).log()
    if weights is None:
        return -log_probs.gather(1, tokens[:, None]).mean()
    return -(weights * log_probs.gather(1, tokens)).sum(1).mean()


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("small", [False, True])
def test_the_loss_and_its_gradients_against_autograd(soft, small, monkeypatch):
    if small:
        monkeypatch.setattr(head_module, "_CHUNK_ELEMENTS", 1)
        for name, value in (("_SOFTMAX_LOGITS", 1), ("_FEWEST_SOFTMAX", 2), ("_SLOPES", 1)):
            monkeypatch.setattr(loss_module, name, value)
        monkeypatch.setattr(loss_module, "_FEWEST_SLOPES", 4)
    head = made(3, torch.float64)
    hidden = torch.randn(9, 5, dtype=torch.float64)
    tokens = torch.randint(7, (9, 4) if soft else (9,))
    weights = torch.rand(9, 4, dtype=torch.float64) if soft else None
    results = []
    for function in (head, lambda *args: plain(head, *args)):
        head.zero_grad()
        states = hidden.clone().requires_grad_()
        loss = function(states, tokens, weights)
        (3 * loss).backward()
        gradients = [p.grad.clone() for p in head.parameters()]
        results.append([loss.detach(), states.grad, *gradients])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradcheck_in_float64():
    head = made(2, torch.float64)
    hidden = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([0, 6, 2, 2])
    names, values = zip(*head.named_parameters(), strict=True)

    def loss(states, *parameters):
        replaced = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(head, replaced, (states, tokens))

    assert torch.autograd.gradcheck(loss, (hidden, *values))
    assert torch.autograd.gradcheck(head.log_probs, (hidden,))


def test_bad_input():
    for components in (0, -1, 1.5, True):
        with pytest.raises(SettingError, match="components"):
            MixtureOfSoftmaxes(4, 5, components)
    head = MixtureOfSoftmaxes(4, 5)
    with pytest.raises(KNNLMError, match="3-d"):
        head(torch.zeros(1, 3), torch.tensor([0]))
    with pytest.raises(KNNLMError, match="T targets"):
        head(torch.zeros(2, 4), torch.zeros(2, 3).long(), torch.zeros(2, 4))
