"""The equation, against numbers worked by hand and a float64 loop that shares no code with it."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax

from knnlm_hf import interpolation
from knnlm_hf.errors import SettingError

INF = math.inf


def brute_force(similarity, tokens, temperature, vocab_size):
    """p_kNN by its definition, entry by entry, in float64."""
    result = np.zeros((len(similarity), vocab_size))
    for q, (row, carried) in enumerate(zip(similarity, tokens, strict=True)):
        hits = [
            (float(s) / temperature, int(w)) for s, w in zip(row, carried, strict=True) if s > -INF
        ]
        if not hits:
            continue
        peak = max(s for s, _ in hits)
        total = sum(math.exp(s - peak) for s, _ in hits)
        for s, w in hits:
            result[q, w] += math.exp(s - peak) / total
    return result


def test_two_neighbours_of_one_token_are_summed():
    # Squared distances 0 and ln 3 at t=1 weigh 1 and 1/3; tokens 2, 0, 0: weights 3/5, 1/5, 1/5.
    similarity = torch.tensor([[0.0, -math.log(3), -math.log(3)]])
    log_probs = interpolation.knn_log_probs(similarity, torch.tensor([[2, 0, 0]]), 1.0, 4)
    assert torch.allclose(log_probs.exp(), torch.tensor([[0.4, 0.0, 0.6, 0.0]]))
    assert log_probs[0, 1] == -INF
    assert log_probs[0, 3] == -INF


def test_the_mixture_by_hand():
    lm = torch.tensor([[0.5, 0.25, 0.25]]).log()
    knn = torch.tensor([[1.0, 0.0, 0.0]]).log()
    mixed = interpolation.mix_distributions(lm, [knn], [0.2])
    assert torch.allclose(mixed.exp(), torch.tensor([[0.6, 0.2, 0.2]]))
    # A word that no neighbour carries has exactly log(1−λ) + log P_LM.
    assert mixed[0, 1].item() == pytest.approx(math.log(0.8) + math.log(0.25), abs=1e-6)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 13.0, 1e4])
@pytest.mark.parametrize(
    ("queries", "k", "vocab"), [(1, 1, 1), (3, 7, 5), (5, 64, 11), (2, 3, 997)]
)
def test_against_float64(queries, k, vocab, temperature):
    generator = torch.Generator().manual_seed(queries * 1000 + k)
    similarity = -torch.rand(queries, k, generator=generator) * 100
    similarity[torch.rand(queries, k, generator=generator) < 0.2] = -INF
    similarity = similarity.sort(1, descending=True).values
    tokens = torch.randint(vocab, (queries, k), generator=generator)
    tokens[similarity == -INF] = -1
    expected = brute_force(similarity.tolist(), tokens.tolist(), temperature, vocab)
    got = interpolation.knn_log_probs(similarity, tokens, temperature, vocab)
    assert not got.isnan().any()
    np.testing.assert_allclose(got.double().exp().numpy(), expected, rtol=2e-4, atol=1e-30)
    targets = torch.randint(vocab, (queries,), generator=generator)
    one = interpolation.token_knn_log_probs(similarity, tokens == targets[:, None], temperature)
    torch.testing.assert_close(one, got[torch.arange(queries), targets], rtol=1e-5, atol=1e-4)


def test_a_tiny_weight_is_small_not_zero():
    # e^-300 underflows float32: only log space keeps it.
    got = interpolation.knn_log_probs(torch.tensor([[0.0, -300.0]]), torch.tensor([[0, 1]]), 1.0, 2)
    assert got[0, 1].item() == pytest.approx(-300, abs=1e-3)


@pytest.mark.parametrize("least", [-0.5, -690.0, -700.0, -740.0, -800.0, -1e5])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_one_query_is_as_one_of_two(least, dtype):
    """Its way is another where float64 holds every weight; below e^-690 it is the same."""
    similarity = torch.tensor([[0.0, -0.25, -0.25, least / 2, least]])
    tokens = torch.tensor([[3, 0, 3, 1, 4]], dtype=dtype)
    one = interpolation.knn_log_probs(similarity, tokens, 1.0, 6)
    two = interpolation.knn_log_probs(similarity.repeat(2, 1), tokens.repeat(2, 1), 1.0, 6)
    torch.testing.assert_close(one, two[:1], rtol=1e-6, atol=1e-6)
    assert one[0, 4].item() == pytest.approx(least - math.log(1 + 2 * math.exp(-0.25)), abs=0.6)
    assert (one[0, [2, 5]] == -INF).all()


def few(scores, tokens, temperature=1.0, vocab_size=6, dtype=torch.float32):
    return interpolation.said_by_few(
        torch.tensor([scores], dtype=dtype), torch.tensor([tokens]), temperature, vocab_size
    )


def test_few_by_hand():
    """Neighbours of weights 1, 1 and 2, two of them of one token."""
    said = few([0.0, 0.0, math.log(2)], [3, 0, 3])
    expected = torch.tensor([[0.25, 0.0, 0.0, 0.75, 0.0, 0.0]])
    torch.testing.assert_close(said.log_probs().exp(), expected)
    lm = torch.tensor([[0.1, 0.2, 0.3, 0.1, 0.3, 0.0]])
    mixed = interpolation.mix(lm.log(), [said], [0.4])
    torch.testing.assert_close(mixed.exp(), 0.6 * lm + 0.4 * expected)
    assert mixed[0, 5] == -INF
    assert lm[0, 3] == 0.1  # what was given is as it was


@pytest.mark.parametrize("temperature", [0.3, 1.0, 40.0])
def test_few_are_mixed_as_all(temperature):
    """The same as dense log-probabilities, also beside memories of another kind, in any order."""
    generator = torch.Generator().manual_seed(0)
    lm = log_softmax(8 * torch.randn(1, 1, 50, generator=generator), -1)
    head = log_softmax(torch.randn(1, 1, 50, generator=generator), -1)
    scores = [-30 * torch.rand(1, 40, generator=generator) for _ in range(2)]
    tokens = [torch.randint(50, (1, 40), generator=generator) for _ in range(2)]
    one, other = (
        interpolation.said_by_few(*pair, temperature, 50)
        for pair in zip(scores, tokens, strict=True)
    )
    dense = [said.log_probs().view(1, 1, 50) for said in (one, other)]
    for memories, all_dense in (
        ([one], dense[:1]),
        ([one, head, other], [dense[0], head, dense[1]]),
        ([head, one], [head, dense[0]]),
    ):
        lmbdas = [0.3, 0.2, 0.1][: len(memories)]
        got = interpolation.mix(lm, memories, lmbdas)
        terms = [t.double().exp() * w for t, w in zip(all_dense, lmbdas, strict=True)]
        expected = ((1 - sum(lmbdas)) * lm.double().exp() + sum(terms)).log()
        torch.testing.assert_close(got, expected.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("scores", "options"),
    [
        ([0.0, -INF], {}),
        ([-INF, -INF], {}),
        ([0.0, -700.0], {}),
        ([0.0, -7.0], {"temperature": 0.01}),
        ([0.0, -1.0], {"dtype": torch.float64}),
        ([0.0, -1.0], {"dtype": torch.bfloat16}),
        ([0.0, -1.0], {"vocab_size": 2}),
    ],
)
def test_what_few_cannot_say(scores, options):
    """A missing hit, a weight that float64 does not hold in full, another dtype or token."""
    assert few(scores, [1, -1 if scores[1] == -INF else 2], **options) is None


def test_few_of_several_queries_or_with_gradients():
    scores, tokens = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.long)
    assert interpolation.said_by_few(scores, tokens, 1.0, 4) is None
    assert interpolation.said_by_few(scores[:1].requires_grad_(), tokens[:1], 1.0, 4) is None


def test_equal_neighbours_share_evenly_however_large_their_similarity():
    # s / t = 3e7, where float32 numbers are 2 apart: log 360 = 5.9 has no digits there.
    weights = interpolation.knn_weights(torch.full((1, 360), 16.0), 5e-7)
    torch.testing.assert_close(weights.exp(), torch.full((1, 360), 1 / 360))


def test_a_query_without_hits_is_the_model_alone():
    similarity, tokens = torch.full((1, 4), -INF), torch.full((1, 4), -1)
    knn = interpolation.knn_log_probs(similarity, tokens, 1.0, 3)
    assert (knn == -INF).all()
    lm = torch.tensor([[0.5, 0.25, 0.25]]).log()
    assert torch.equal(interpolation.mix_distributions(lm, [knn], [0.9]), lm)
    assert (interpolation.knn_weights(similarity, 1.0) == -INF).all()


def test_a_missing_hit_gives_nothing_to_any_token():
    # id −1 has token −1: indexing with it would silently give the last token of the vocabulary.
    similarity = torch.tensor([[0.0, -INF]])
    got = interpolation.knn_log_probs(similarity, torch.tensor([[0, -1]]), 1.0, 3)
    assert got.exp().tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_gives_float32(dtype):
    lm = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).log_softmax(-1).to(dtype)
    knn = torch.randn(2, 5, generator=torch.Generator().manual_seed(1)).log_softmax(-1).to(dtype)
    mixed = interpolation.mix_distributions(lm, [knn], [0.5])
    assert mixed.dtype == torch.float32
    expected = np.log(0.5 * np.exp(lm.double().numpy()) + 0.5 * np.exp(knn.double().numpy()))
    np.testing.assert_allclose(mixed.numpy(), expected, atol=1e-5)


def test_the_gradient_where_neither_has_the_word():
    """logaddexp(−inf, −inf) has a gradient of NaN; the mixture's is that of what there is."""
    lm = torch.tensor([0.25, 0.75, 0.0], dtype=torch.float32).log().requires_grad_()
    memory = torch.tensor([1.0, 0.0, 0.0]).log()
    mixed = interpolation.mix(lm, [memory], [0.2])
    assert mixed[2] == -INF
    mixed[:2].sum().backward()  # d log(.8 p + .2 q) / d log p = .8 p / (.8 p + .2 q)
    torch.testing.assert_close(lm.grad, torch.tensor([0.2 / 0.4, 1.0, 0.0]))


def test_lambda_zero_is_exactly_the_model():
    lm = torch.randn(3, 7).log_softmax(-1)
    assert torch.equal(interpolation.mix(lm, [torch.full((3, 7), -INF)], [0.0]), lm)


@pytest.mark.parametrize("temperature", [0, -1.0, INF, math.nan])
def test_a_temperature_out_of_range_is_refused(temperature):
    with pytest.raises(SettingError, match="temperature"):
        interpolation.knn_weights(torch.zeros(1, 2), temperature)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_the_default_temperature_scales_with_the_distances(scale):
    generator = torch.Generator().manual_seed(0)
    similarity = -torch.rand(32, 512, generator=generator) * scale
    t = interpolation.default_temperature(similarity)
    weights = interpolation.knn_weights(similarity, t).exp()
    effective = torch.exp(-(weights * weights.log()).sum(1)).median().item()
    assert effective == pytest.approx(64, rel=0.05)


def test_the_default_temperature_where_there_is_nothing_to_go_by():
    assert interpolation.default_temperature(torch.full((2, 3), -INF)) == 1.0
    assert interpolation.default_temperature(torch.zeros(2, 3)) == 1.0
    assert interpolation.default_temperature(torch.zeros(0, 3)) == 1.0
