"""Every kind of head in its place: made from a store, saved, wrapped, scored and tuned."""

import math

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from knnlm_hf import (
    CentroidMemory,
    Datastore,
    KNNLMForCausalLM,
    Memory,
    MixtureOfSoftmaxes,
    MLPMemory,
    perplexity,
    score,
    tune,
)
from knnlm_hf.errors import KNNLMError, PersistenceError, SettingError
from knnlm_hf.memory.head import Head

FAST = {"epochs": 8, "batch_size": 64, "lr": 0.02, "progress": False}
KINDS = {
    "mixture": (MixtureOfSoftmaxes, {"components": 2}),
    "centroids": (CentroidMemory, {"clusters": 40, "temperature": 60.0}),
    "trained centroids": (CentroidMemory, {"clusters": 40, "fine_tune": True, "prior": "uniform"}),
    "mlp": (MLPMemory, {"layers": 2, "budget": 4.0, "dropout": 0.1}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("rivals") / "gpt2"
    tiny.gpt2().save_pretrained(path)
    return type(tiny.gpt2()).from_pretrained(path).eval()


@pytest.fixture(scope="module")
def store(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("rivals") / "store"
    return Datastore.build(model, tiny.corpus(30), path, progress=False)


@pytest.fixture(scope="module", params=KINDS)
def head(request, store):
    cls, settings = KINDS[request.param]
    return cls.train_on(store, **settings, **FAST)


def test_it_has_learned_and_is_a_memory(head, store):
    assert isinstance(head, Memory)
    assert isinstance(head, Head)
    assert (head.layer, head.hidden_size, head.vocab_size) == ("att", 24, tiny.VOCAB)
    keys, tokens = store.keys[:].float(), store.values.long()
    log_probs = head.log_probs(keys.view(1, *keys.shape))[0]
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(len(keys)), rtol=1e-4, atol=0)
    loss = -head.token_log_probs(keys, tokens).mean().item()
    assert loss == pytest.approx(-log_probs.gather(1, tokens[:, None]).mean().item(), rel=1e-4)
    assert loss < 0.85 * math.log(tiny.VOCAB)
    assert head.trained.store == store.digest
    assert head.origin == store.manifest.model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_saved_bit_equal(head, dtype, tmp_path):
    kept = {name: value.clone() for name, value in head.state_dict().items()}
    try:
        head.to(dtype).save_pretrained(tmp_path)
        loaded = Head.from_pretrained(tmp_path)
        assert type(loaded) is type(head)
        assert loaded.settings() == head.settings()
        assert loaded.trained == head.trained
        for name, value in head.state_dict().items():
            assert loaded.state_dict()[name].dtype == value.dtype
            assert torch.equal(loaded.state_dict()[name], value)
        queries = torch.randn(3, 24)
        assert torch.equal(loaded.log_probs(queries), head.log_probs(queries))
        assert head.log_probs(queries).dtype == torch.float32
    finally:
        head.float().load_state_dict(kept)


def test_in_the_wrapper(head, model, tmp_path):
    knn = KNNLMForCausalLM(model, head, lmbda=0.3)
    ids = torch.tensor([[5, 6, 7, 5]])
    with knn.disable_retrieval():
        base = knn(ids).logits.softmax(-1)
    kept = []
    handle = model.transformer.h[-1].mlp.register_forward_pre_hook(lambda m, x: kept.append(x[0]))
    model(ids)
    handle.remove()
    expected = 0.7 * base + 0.3 * head.log_probs(kept[0]).exp()
    torch.testing.assert_close(knn(ids).logits.exp(), expected, rtol=1e-4, atol=1e-6)
    assert knn.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 7)
    knn.save_pretrained(tmp_path)
    again = KNNLMForCausalLM.from_pretrained(tmp_path)
    assert type(again.memory) is type(head)
    torch.testing.assert_close(again(ids).logits, knn(ids).logits)


def test_it_is_scored_and_tuned(head, model):
    corpus = tiny.corpus(4, seed=5)
    knn = KNNLMForCausalLM(model, head, lmbda=0.3)
    scores = score(knn, corpus, progress=False)
    base = KNNLMForCausalLM(model, head, lmbda=0.0)
    report = perplexity(knn, corpus, progress=False)
    assert report.perplexity == pytest.approx(scores.perplexity(), rel=1e-5)
    assert report.base_perplexity == pytest.approx(perplexity(base, corpus).perplexity, rel=1e-5)
    best = tune(knn, corpus, progress=False)
    assert best.helps
    assert knn.lmbda == best.lmbda
    assert best.perplexity < report.base_perplexity
    assert best.perplexity <= report.perplexity * (1 + 1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_the_same_seed_gives_the_same_head(name, store):
    cls, settings = KINDS[name]
    options = {**settings, **FAST, "epochs": 1}
    first, again, other = (cls.train_on(store, **options, seed=seed) for seed in (1, 1, 2))
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)
    )
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


def damaged(tmp_path, head, change):
    head.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(PersistenceError) as refusal:
        Head.from_pretrained(tmp_path)
    return str(refusal.value)


def test_a_damaged_table_is_refused(store, tmp_path):
    head = CentroidMemory.train_on(store, clusters=4, progress=False)

    def outside(tensors):
        tensors["pair_centroids"][0] = 4

    def negative(tensors):
        tensors["pair_centroids"][0] = -1

    def disordered(tensors):
        tensors["token_starts"][3] = 10**9

    def short(tensors):
        tensors["token_starts"] = tensors["token_starts"][:0]

    def other_type(tensors):
        tensors["pair_centroids"] = tensors["pair_centroids"].long()

    for change in (outside, negative, disordered, short, other_type):
        assert "table" in damaged(tmp_path, head, change)


def test_layers_that_are_not_there_are_refused(store, tmp_path):
    head = MLPMemory(24, tiny.VOCAB, layers=2, width=3)
    assert "2 layers, it has 1" in damaged(tmp_path, head, lambda t: t.pop("blocks.1.down.bias"))


def test_bad_settings_and_stores(store, tmp_path):
    for cls, settings in KINDS.values():
        with pytest.raises(SettingError, match="unknown setting rows"):
            cls.train_on(store, rows=3, **settings)
        with pytest.raises(SettingError, match="epochs"):
            cls.train_on(store, **settings, epochs=0)
    small = Datastore.build(tiny.gpt2(), [[3, 4]], tmp_path / "small", progress=False)
    keys = torch.full((len(store), store.dim), torch.nan)
    broken = Datastore.open(store.path)
    broken.keys = type(store.keys)([keys])
    for cls, settings in KINDS.values():
        with pytest.raises(KNNLMError, match="1 entries"):
            cls.train_on(small, **settings, progress=False)
        with pytest.raises(KNNLMError, match="not finite"):
            cls.train_on(broken, **settings, progress=False)
