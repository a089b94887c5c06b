"""`exclude_self`: a token's own entry is known by its number, so the corpus must be the store's."""

import pytest
import tiny
import torch

from knnlm_hf import Datastore, KNNLMForCausalLM, KNNMemory, perplexity, score
from knnlm_hf.errors import KNNLMError

K, T = 12, 40.0


@pytest.fixture(scope="module")
def model():
    return tiny.gpt2()


@pytest.fixture(scope="module")
def store(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "store"
    return Datastore.build(model, tiny.corpus(), path, progress=False)


@pytest.fixture(scope="module")
def knn(model, store):
    return KNNLMForCausalLM(model, KNNMemory(store, k=K, temperature=T))


def other_corpora(items):
    tail = [ids for ids in items if len(ids) > 1][1:]
    return {
        "reversed": items[::-1],
        "from the middle": tail,
        "repeated": items + items,
        "half a document less": [items[-1][1:], *items],
    }


@pytest.mark.parametrize("case", other_corpora(tiny.corpus()))
@pytest.mark.parametrize("batch_size", [1, 8])
def test_own_text_that_is_another_one_is_refused(knn, case, batch_size):
    options = {"exclude_self": True, "batch_size": batch_size, "progress": False}
    for call in (score, perplexity):
        with pytest.raises(KNNLMError, match="score the corpus that the store was built from"):
            call(knn, other_corpora(tiny.corpus())[case], **options)


def test_the_first_token_that_is_not_the_store_s_own_is_named(knn, store):
    items = [list(ids) for ids in tiny.corpus()]
    entries = [(d, token) for d, ids in enumerate(items) for token in ids[1:]]
    document, token = entries[-3]
    items[document][-3] = (token + 1) % tiny.VOCAB
    message = (
        f"entry {len(entries) - 3} carries token {token}, but the corpus has token "
        rf"{(token + 1) % tiny.VOCAB} \(document {document}\): .* with bos=False"
    )
    with pytest.raises(KNNLMError, match=message) as refused:
        score(knn, items, exclude_self=True, batch_size=2, progress=False)
    assert "\n" not in str(refused.value)
    more = [*tiny.corpus(), [1, 2]]
    message = rf"token 2 \(document {len(more) - 1}\) after the last of the {len(entries):,}"
    with pytest.raises(KNNLMError, match=message):
        score(knn, more, exclude_self=True, progress=False)


def test_own_text_of_a_store_with_bos_or_of_a_sample(model, store, tmp_path):
    items = tiny.corpus()
    with_bos = Datastore.build(model, items, tmp_path / "bos", bos=True, progress=False)
    mixture = KNNLMForCausalLM(model, KNNMemory(with_bos, k=K, temperature=T))
    with pytest.raises(KNNLMError, match="with bos=True"):
        score(mixture, items, exclude_self=True, progress=False)
    score(mixture, items, exclude_self=True, bos=True, progress=False)
    store.subsample(0.99, tmp_path / "sample", seed=0)
    sample = KNNMemory(Datastore.open(tmp_path / "sample"), k=K, temperature=T)
    with pytest.raises(
        KNNLMError, match=r"is a subsample, .*: use the datastore that it was drawn"
    ):
        score(KNNLMForCausalLM(model, sample), items, exclude_self=True, progress=False)
    both = KNNLMForCausalLM(model, [mixture.memory, KNNMemory(store, k=K)], lmbda=0.2)
    for bos in (True, False):  # the two are of different texts
        with pytest.raises(KNNLMError, match=f"with bos={not bos}"):
            score(both, items, exclude_self=True, bos=bos, progress=False)


def test_the_beginning_of_own_text_and_removed_documents(knn, model, tmp_path):
    """Entries of removed documents keep their numbers; a compacted store has others."""
    items, options = tiny.corpus(), {"exclude_self": True, "progress": False}
    whole, part = score(knn, items, **options), score(knn, items[:5], **options)
    n = len(part)
    assert n < len(whole)
    torch.testing.assert_close(part.memories[0].similarity, whole.memories[0].similarity[:n])
    store = Datastore.build(model, items, tmp_path / "s", progress=False)
    gone = next(number for number, ids in enumerate(items) if len(ids) > 1)
    store.remove([gone])
    mixture = KNNLMForCausalLM(model, KNNMemory(store, k=1000, temperature=T))
    found = score(mixture, items, **options).memories[0]
    is_live = torch.tensor([d != gone for d, ids in enumerate(items) for _ in ids[1:]])
    hits = found.similarity.isfinite().sum(1)
    assert (hits[is_live] == store.live - 1).all()
    assert (hits[~is_live] == store.live).all()
    rest = [ids for number, ids in enumerate(items) if number != gone]
    with pytest.raises(KNNLMError, match="from its beginning, the removed ones too"):
        score(mixture, rest, **options)
    store.compact(tmp_path / "c")
    compacted = KNNMemory(Datastore.open(tmp_path / "c"), k=1000, temperature=T)
    mixture = KNNLMForCausalLM(model, compacted)
    assert (score(mixture, rest, **options).memories[0].similarity.isfinite().sum(1) > 0).all()
    with pytest.raises(KNNLMError, match="score the corpus"):
        score(mixture, items, **options)
