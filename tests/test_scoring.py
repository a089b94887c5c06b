"""Scores against a plain loop: one token at a time, plain forward, plain hook, float64 kNN."""

import math
from functools import partial

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from tiny_memory import head_of

from knnlm_hf import Datastore, KNNLMForCausalLM, KNNMemory, perplexity, score, tune
from knnlm_hf.errors import CorpusError, KNNLMError, ModelMismatchError, SettingError
from knnlm_hf.interpolation import knn_log_probs
from knnlm_hf.memory import Evidence
from knnlm_hf.scores import TokenScores

K, T, LMBDA = 12, 40.0, 0.3


@pytest.fixture(scope="module")
def model():
    return tiny.gpt2()


@pytest.fixture(scope="module")
def store(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("scoring") / "store"
    return Datastore.build(
        model, tiny.corpus(), path, dtype="float32", window=16, stride=8, progress=False
    )


@pytest.fixture(scope="module")
def knn(model, store):
    return KNNLMForCausalLM(model, KNNMemory(store, k=K, temperature=T), lmbda=LMBDA)


held_out = tiny.corpus(documents=4, seed=5)


def plain_forward(model, ids):
    """Log-probabilities and `att` states of one row, with a hook of our own."""
    kept = []
    mlp = model.transformer.h[-1].mlp
    handle = mlp.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    handle.remove()
    return (logits - logits.logsumexp(-1, keepdim=True)).numpy(), kept[0][0].double().numpy()


def reference(model, store, items, window, stride, k=K, t=T, own=False):
    """(lm, kNN) probability of every token but each document's first, window by window."""
    keys, values = store.keys[:].double().numpy(), store.values.numpy()
    lm, knn, entry = [], [], 0
    for ids in items:
        done = 0  # predictions made
        start = 0
        while done < len(ids) - 1:
            inputs = ids[start : start + window]
            log_probs, states = plain_forward(model, inputs)
            for j in range(len(inputs)):
                at = start + j + 1
                if at >= len(ids) or at <= done:
                    continue
                lm.append(log_probs[j, ids[at]])
                similarity = -((keys - states[j]) ** 2).sum(1)
                if own:
                    similarity[entry] = -np.inf
                entry += 1
                nearest = np.argsort(-similarity, kind="stable")[:k]
                weights = np.exp((similarity[nearest] - similarity[nearest].max()) / t)
                knn.append((weights * (values[nearest] == ids[at])).sum() / weights.sum())
                done = at
            start += stride
    return np.array(lm), np.array(knn)


def mixed(lm, knn, lmbda):
    return np.log((1 - lmbda) * np.exp(lm) + lmbda * knn)


@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 16), (7, 3), (1, 1), (32, 1)])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_every_token_against_the_loop(knn, model, store, window, stride, batch_size):
    lm, p_knn = reference(model, store, held_out, window, stride)
    scores = score(
        knn, held_out, window=window, stride=stride, batch_size=batch_size, progress=False
    )
    assert len(scores) == sum(max(0, len(ids) - 1) for ids in held_out)
    np.testing.assert_allclose(scores.lm_log_probs.numpy(), lm, atol=1e-4)
    np.testing.assert_allclose(scores.memory_log_probs().exp().numpy(), p_knn, atol=2e-4)
    np.testing.assert_allclose(scores.log_probs().numpy(), mixed(lm, p_knn, LMBDA), atol=2e-4)
    expected = math.exp(-mixed(lm, p_knn, LMBDA).mean())
    assert scores.perplexity() == pytest.approx(expected, rel=1e-4)
    assert scores.oracle() == pytest.approx(
        math.exp(-np.log(np.maximum(np.exp(lm), p_knn)).mean()), rel=1e-4
    )
    report = perplexity(
        knn, held_out, window=window, stride=stride, batch_size=batch_size, progress=False
    )
    assert report.perplexity == pytest.approx(expected, rel=1e-4)
    assert report.base_perplexity == pytest.approx(math.exp(-lm.mean()), rel=1e-4)
    assert report.tokens == len(lm)


def test_tokens_documents_and_context(knn):
    scores = score(knn, held_out, window=16, stride=8, progress=False)
    expected = [(d, token) for d, ids in enumerate(held_out) for token in ids[1:]]
    assert list(zip(scores.documents.tolist(), scores.tokens.tolist(), strict=True)) == expected
    assert int(scores.context.min()) == 1
    assert int(scores.context.max()) == 16


@pytest.mark.parametrize(("lmbda", "t", "k"), [(0.0, 1.0, 1), (0.5, 5.0, 3), (0.9, 100.0, 12)])
def test_any_setting_without_a_new_search(knn, model, store, lmbda, t, k):
    scores = score(knn, held_out, window=16, stride=8, progress=False)
    lm, p_knn = reference(model, store, held_out, 16, 8, k=k, t=t)
    expected = math.exp(-mixed(lm, p_knn, lmbda).mean())
    assert scores.perplexity(lmbda=lmbda, temperature=t, k=k) == pytest.approx(expected, rel=1e-4)


def test_scores_agree_with_the_wrapper_s_own_loss(knn):
    ids = held_out[-1][:16]
    loss = knn(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
    report = perplexity(knn, [ids], progress=False)
    assert report.nll == pytest.approx(loss, rel=1e-4)


def test_the_memory_alone_is_infinite_when_one_token_has_no_neighbour(knn):
    scores = score(knn, held_out, progress=False)
    assert (scores.memory_log_probs(k=1) == -math.inf).any()
    assert scores.memory_perplexity(k=1) == math.inf
    assert math.isfinite(scores.perplexity(k=1))


def test_own_text_does_not_find_itself(knn, model, store):
    items = tiny.corpus()
    _, p_knn = reference(model, store, items, 16, 8, own=True)
    scores = score(knn, items, window=16, stride=8, exclude_self=True, progress=False)
    np.testing.assert_allclose(scores.memory_log_probs().exp().numpy(), p_knn, atol=2e-4)
    found = score(knn, items, window=16, stride=8, progress=False)
    assert found.perplexity() < scores.perplexity()


def test_text_files_datasets_and_lists_agree(knn, tmp_path):
    tokenizer = tiny.tokenizer()
    items = [ids for ids in held_out if len(ids) > 1]
    texts = tiny.text(items)
    by_ids = perplexity(knn, items, progress=False)
    by_text = perplexity(knn, texts, tokenizer=tokenizer, progress=False)
    by_set = perplexity(
        knn, Dataset.from_dict({"text": texts}), tokenizer=tokenizer, progress=False
    )
    assert by_ids.perplexity == by_text.perplexity == by_set.perplexity
    assert by_ids.words is None
    assert by_ids.word_perplexity is None
    words = sum(len(text.split()) for text in texts)
    assert by_text.words == words
    assert by_text.word_perplexity == pytest.approx(
        math.exp(by_text.nll * by_text.tokens / words), rel=1e-9
    )
    (tmp_path / "text").write_text(texts[0])
    one = perplexity(knn, str(tmp_path / "text"), tokenizer=tokenizer, progress=False)
    assert one.perplexity == perplexity(knn, items[:1], progress=False).perplexity


def test_a_plain_model_is_scored_too(model, knn):
    plain = perplexity(model, held_out, progress=False)
    assert plain.perplexity == plain.base_perplexity
    assert plain.memory_perplexity is None
    assert plain.base_perplexity == perplexity(knn, held_out, progress=False).base_perplexity
    scores = score(model, held_out, progress=False)
    assert scores.perplexity() == scores.base_perplexity
    with pytest.raises(KNNLMError, match="without memory"):
        scores.oracle()
    with pytest.raises(KNNLMError, match="without memory"):
        scores.perplexity(lmbda=0.1)
    with pytest.raises(KNNLMError, match="datastore"):
        score(model, held_out, exclude_self=True, progress=False)


def test_a_memory_that_does_not_search(model, knn):
    class Uniform:
        layer, hidden_size, vocab_size = "att", 24, tiny.VOCAB

        def log_probs(self, hidden):
            return torch.full((*hidden.shape[:-1], tiny.VOCAB), -math.log(tiny.VOCAB))

        def token_log_probs(self, hidden, tokens):
            return torch.full(tokens.shape, -math.log(tiny.VOCAB))

    mixture = KNNLMForCausalLM(model, Uniform(), lmbda=0.4)
    scores = score(mixture, held_out, progress=False)
    expected = torch.log(0.6 * scores.lm_log_probs.exp() + 0.4 / tiny.VOCAB)
    torch.testing.assert_close(scores.log_probs(), expected)
    assert scores.memory_perplexity() == pytest.approx(tiny.VOCAB)
    with pytest.raises(SettingError, match="without k"):
        scores.memory_log_probs(temperature=2.0)


@pytest.mark.parametrize("layer", ["ffn", "final", "transformer.h.0"])
def test_other_layers(model, layer, tmp_path):
    store = Datastore.build(
        model, tiny.corpus(), tmp_path / "s", layer=layer, dtype="float32", progress=False
    )
    knn = KNNLMForCausalLM(model, KNNMemory(store, k=5, temperature=9.0), lmbda=0.5)
    ids = held_out[-1][:20]
    loss = knn(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
    assert perplexity(knn, [ids], progress=False).nll == pytest.approx(loss, rel=1e-4)


def test_queries_without_any_hit_leave_the_model_alone():
    lm = torch.tensor([-1.0, -2.0])
    scores = TokenScores(
        lm_log_probs=lm, tokens=torch.tensor([0, 1]),
        documents=torch.zeros(2), context=torch.ones(2),
        memories=(
            Evidence(
                similarity=torch.tensor([[-math.inf, -math.inf], [0.0, -math.inf]]),
                is_target=torch.tensor([[False, False], [False, False]]),
            ),
        ),
        lmbdas=(0.5,),
    )  # fmt: skip
    assert scores.log_probs().tolist() == pytest.approx([-1.0, -2.0 + math.log(0.5)])


def test_another_tokenizer_than_the_store_s_is_refused(model, tmp_path):
    tokenizer, texts = tiny.tokenizer(), tiny.text(tiny.corpus()[2:])
    store = Datastore.build(model, texts, tmp_path / "s", tokenizer=tokenizer, progress=False)
    mixture = KNNLMForCausalLM(model, store)
    perplexity(mixture, texts, tokenizer=tiny.tokenizer(), progress=False)
    other = tiny.tokenizer(reverse=True)
    with pytest.raises(ModelMismatchError, match="another tokenizer"):
        perplexity(mixture, texts, tokenizer=other, progress=False)


@pytest.fixture(scope="module")
def several(model, store, tmp_path_factory):
    """A search in `att`, a head that reads `ffn`, and a smaller search in `ffn`."""
    path = tmp_path_factory.mktemp("scoring") / "ffn"
    other = Datastore.build(
        model, tiny.corpus(), path, layer="ffn", dtype="float32", window=16, stride=8,
        progress=False,
    )  # fmt: skip
    memories = [
        KNNMemory(store, k=K, temperature=T),
        head_of(model, "ffn"),
        KNNMemory(other, k=5, temperature=90.0),
    ]
    return KNNLMForCausalLM(model, memories, lmbda=[0.3, 0.1, 0.2])


def test_several_memories_in_one_pass(several, model):
    """Each memory's evidence is what it is when scored alone; the mixture is that of the parts."""
    options = {"window": 16, "stride": 8, "progress": False}
    scores = score(several, held_out, **options)
    assert (scores.lmbda, scores.k) == ((0.3, 0.1, 0.2), (K, None, 5))
    assert scores.temperature == (T, 1.0, 90.0)
    alone = []
    for memory in several.memories:
        alone.append(score(KNNLMForCausalLM(model, memory), held_out, **options).memory_log_probs())
    assert not scores.memories[1].scores.requires_grad
    torch.testing.assert_close(scores.memory_log_probs(), torch.stack(alone))
    parts = torch.stack(alone).double().exp()
    base = scores.lm_log_probs.double().exp()
    mixed = 0.4 * base + torch.tensor([0.3, 0.1, 0.2], dtype=torch.float64) @ parts
    expected = math.exp(-mixed.log().mean())
    assert scores.perplexity() == pytest.approx(expected, rel=1e-5)
    best = math.exp(-torch.maximum(base, parts.amax(0)).log().mean())
    assert scores.oracle() == pytest.approx(best, rel=1e-5)
    report = perplexity(several, held_out, **options)
    assert report.perplexity == pytest.approx(expected, rel=1e-5)
    assert report.oracle_perplexity == pytest.approx(best, rel=1e-5)
    assert report.memory_perplexity == pytest.approx(scores.memory_perplexity())
    assert len(scores.memory_perplexity()) == 3


def test_the_loss_of_several_memories_is_their_perplexity(several):
    ids = held_out[-1][:20]
    loss = several(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
    assert perplexity(several, [ids], progress=False).nll == pytest.approx(loss, rel=1e-4)


def test_settings_of_several_memories(several):
    scores = score(several, held_out, progress=False)
    near, head, other = scores.memories
    # One value is for every memory that searches; a list has one for each, None for its own.
    torch.testing.assert_close(
        scores.memory_log_probs(temperature=7.0, k=3),
        torch.stack([near.log_probs(7.0, 3), head.log_probs(), other.log_probs(7.0, 3)]),
    )
    torch.testing.assert_close(
        scores.memory_log_probs(temperature=[None, None, 7.0], k=[2, None, None]),
        torch.stack([near.log_probs(k=2), head.log_probs(), other.log_probs(7.0)]),
    )
    assert scores.perplexity(lmbda=[0, 0, 0]) == scores.base_perplexity
    assert scores.perplexity(lmbda=0.3) == scores.perplexity(lmbda=[0.1] * 3)
    for settings, message in [
        ({"k": 6}, "only 5 neighbours"),
        ({"temperature": [1.0, 2.0, 3.0]}, "without k and temperature"),
        ({"k": [3, None]}, "k has 2 values for 3 memories"),
        ({"lmbda": [0.5, 0.5, 0.1]}, "sum below 1"),
    ]:
        with pytest.raises(SettingError, match=message):
            scores.perplexity(**settings)


def test_own_text_is_excluded_from_every_search(several, model, store):
    items = tiny.corpus()
    options = {"window": 16, "stride": 8, "exclude_self": True, "progress": False}
    scores = score(several, items, **options)
    for number, memory in enumerate(several.memories):
        if number != 1:  # a head has no entries
            alone = score(KNNLMForCausalLM(model, memory), items, **options)
            torch.testing.assert_close(
                scores.memories[number].similarity, alone.memories[0].similarity
            )
    with pytest.raises(KNNLMError, match="needs a model with a datastore"):
        score(KNNLMForCausalLM(model, several.memories[1]), items, **options)


def test_a_search_without_hits_gives_its_share_to_the_model_alone():
    """P = (1 − 0.2) · P_LM + 0.2 · P_head, and λ = 0.5 of the search is the model's."""
    silent = Evidence(similarity=torch.full((1, 2), -math.inf), is_target=torch.zeros(1, 2) > 0)
    scores = TokenScores(
        lm_log_probs=torch.tensor([0.4]).log(), tokens=torch.tensor([0]),
        documents=torch.zeros(1), context=torch.ones(1), lmbdas=(0.2, 0.5),
        memories=(Evidence(scores=torch.tensor([0.9]).log()), silent),
    )  # fmt: skip
    assert scores.log_probs().exp().item() == pytest.approx(0.8 * 0.4 + 0.2 * 0.9)


def test_every_module_s_mode_is_put_back(store, tmp_path):
    """Frozen submodules in evaluation, and heads in a mode of their own."""
    model = tiny.gpt2()
    head = head_of(model, "ffn")
    mixture = KNNLMForCausalLM(model, [head, KNNMemory(store, k=K)], lmbda=[0.1, 0.2])
    mixture.train()
    model.transformer.h[0].eval()
    head.eval()
    modules = [*mixture.modules(), *head.modules()]
    before = [module.training for module in modules]
    assert len(set(before)) == 2
    seen = []
    handle = model.lm_head.register_forward_hook(
        lambda *_: seen.extend(module.training for module in modules)
    )
    for call in (score, perplexity, partial(tune, apply=False)):
        call(mixture, held_out, progress=False)
        assert [module.training for module in modules] == before
    with pytest.raises(CorpusError, match="vocabulary"):
        score(mixture, [held_out[-1], [1, tiny.VOCAB]], batch_size=1, progress=False)
    assert [module.training for module in modules] == before
    Datastore.build(mixture, held_out, tmp_path / "s", progress=False)
    assert [module.training for module in modules] == before
    mixture.eval()
    head.train()
    handle.remove()
    score(mixture, held_out, progress=False)
    assert head.training
    assert not mixture.training
    assert seen
    assert not any(seen)


def test_bad_input(knn):
    for options in ({"window": 0}, {"window": 8, "stride": 9}, {"stride": 0}, {"window": 1000}):
        with pytest.raises(SettingError):
            score(knn, held_out, progress=False, **options)
    with pytest.raises(SettingError, match="batch_size"):
        score(knn, held_out, batch_size=0, progress=False)
    for corpus in ([], [[1]], "/no/such/file", ["text without tokenizer"], 3):
        with pytest.raises(CorpusError):
            score(knn, corpus, progress=False)
    with pytest.raises(CorpusError, match="vocabulary"):
        score(knn, [[1, tiny.VOCAB]], progress=False)
    with pytest.raises(SettingError, match="only 12 neighbours"):
        score(knn, held_out, progress=False).perplexity(k=13)


def test_the_full_distribution_agrees_with_the_target_s_probability(knn, store):
    """The sparse path (scoring) and the dense path (generation) are the same numbers."""
    queries = store.keys[:40]
    near = knn.memory.search(queries)
    dense = knn_log_probs(near.similarity, near.tokens, T, tiny.VOCAB)
    tokens = torch.arange(40) % tiny.VOCAB
    torch.testing.assert_close(
        knn.memory.token_log_probs(queries, tokens), dense[torch.arange(40), tokens]
    )
