"""Searching while the model goes on changes nothing but the time."""

import copy
import shutil
import threading

import pytest
import tiny
import torch
from tiny_memory import head_of

from knnlm_hf import Datastore, KNNLMForCausalLM, KNNMemory, MultiEmbeddingHead
from knnlm_hf.errors import KNNLMError
from knnlm_hf.memory import neighbours
from knnlm_hf.modeling import ahead
from knnlm_hf.parallel import pool

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("ahead") / "store"
    return Datastore.build(tiny.gpt2(), tiny.corpus(20), path, progress=False)


class Watched(KNNMemory):
    """Records which thread asked."""

    def log_probs(self, hidden):
        self.__dict__.setdefault("asked_by", []).append(threading.current_thread().name)
        return super().log_probs(hidden)


@pytest.mark.parametrize("beside_a_head", [False, True])
@pytest.mark.parametrize("layer", ["att", "final"])
def test_the_answer_is_the_same(tmp_path, layer, beside_a_head, monkeypatch):
    model = tiny.gpt2()
    store = Datastore.build(model, tiny.corpus(), tmp_path / "s", layer=layer, progress=False)
    memory = Watched(store, k=8, temperature=5.0)
    memories = [memory, head_of(model), copy.copy(memory)] if beside_a_head else memory
    knn = KNNLMForCausalLM(model, memories, lmbda=0.6)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        early = knn(IDS).logits
        kept = knn(IDS, logits_to_keep=2).logits
    tokens = knn.generate(IDS, **options)
    beams = knn.generate(IDS.repeat(2, 1), num_beams=2, **options)
    assert all(name.startswith("knnlm-hf") for name in memory.asked_by)
    memory.asked_by.clear()
    monkeypatch.setattr(ahead, "_MOST_TOKENS", 0)
    with torch.no_grad():
        torch.testing.assert_close(knn(IDS).logits, early)
        torch.testing.assert_close(knn(IDS, logits_to_keep=2).logits, kept)
    assert torch.equal(knn.generate(IDS, **options), tokens)
    assert torch.equal(knn.generate(IDS.repeat(2, 1), num_beams=2, **options), beams)
    assert set(memory.asked_by) == {threading.current_thread().name}


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    """With indexes that FAISS searches in one call, that the keys refine, and a document less."""
    path = tmp_path_factory.mktemp("ahead") / "indexed"
    store = Datastore.build(tiny.gpt2(), tiny.corpus(20), path, progress=False)
    for metric in ("l2", "ip"):
        for spec in ("IVF2,SQ4", "IVF2,SQ4,Refine(keys)"):
            store.build_index(spec, metric=metric, progress=False)
    return store


def threads_of(monkeypatch, target, *names):
    """The names of the threads that call these methods of `target`, as far as it has them."""
    seen = []

    def watched(call):
        def record(*args, **kwargs):
            seen.append(threading.current_thread().name)
            return call(*args, **kwargs)

        return record

    for name in filter(lambda name: hasattr(target, name), names):
        monkeypatch.setattr(target, name, watched(getattr(target, name)))
    return seen


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("index", ["exact", "IVF2,SQ4", "IVF2,SQ4,Refine(keys)"])
@pytest.mark.parametrize(
    "settings", [{}, {"k": 10_000}, {"rescore": True}, {"metric": "ip"}], ids=str
)
def test_only_the_search_is_handed_over(indexed, rows, index, settings, monkeypatch):
    """The rest would wait for the interpreter's lock, again and again, while the model goes on."""
    memory = KNNMemory(indexed, temperature=5.0, index=index, **{"k": 8, **settings})
    knn = KNNLMForCausalLM(tiny.gpt2(), memory, lmbda=0.6)
    searched = threads_of(monkeypatch, memory.index, "search", "_call")
    said = threads_of(monkeypatch, neighbours, "knn_log_probs")
    ids = IDS.repeat(rows, 1) + torch.arange(rows)[:, None]
    early = [knn(ids[:, :1]).logits, knn(ids).logits]
    assert searched
    assert all(name.startswith("knnlm-hf") for name in searched)
    here = threading.current_thread().name
    assert set(said) == {here}
    searched.clear()
    monkeypatch.setattr(ahead, "_MOST_TOKENS", 0)
    torch.testing.assert_close([knn(ids[:, :1]).logits, knn(ids).logits], early)
    assert set(searched) == {here}


@torch.no_grad()
@pytest.mark.parametrize("index", ["exact", "IVF2,SQ4", "IVF2,SQ4,Refine(keys)"])
def test_what_was_removed_is_not_found_ahead(indexed, tmp_path, index, monkeypatch):
    shutil.copytree(indexed.path, tmp_path / "copy")
    store = Datastore.open(tmp_path / "copy")
    store.remove(range(0, 20, 2))
    knn = KNNLMForCausalLM(tiny.gpt2(), KNNMemory(store, k=8, temperature=5.0, index=index), 0.6)
    early = knn(IDS[:, :1]).logits
    whole = KNNLMForCausalLM(tiny.gpt2(), KNNMemory(indexed, 8, 5.0, index=index), 0.6)
    assert not torch.allclose(whole(IDS[:, :1]).logits, early)
    monkeypatch.setattr(ahead, "_MOST_TOKENS", 0)
    torch.testing.assert_close(knn(IDS[:, :1]).logits, early)


@pytest.mark.parametrize("index", ["exact", "IVF2,SQ4"])
def test_states_that_are_not_finite(indexed, index):
    model = tiny.gpt2()
    knn = KNNLMForCausalLM(model, KNNMemory(indexed, k=8, index=index), allow_mismatch=True)
    model.transformer.wte.weight.data[5] = torch.nan
    with torch.no_grad(), pytest.raises(KNNLMError, match="not finite"):
        knn(IDS[:, :1])


@torch.no_grad()
def test_a_search_of_somebodys_own_is_called(store):
    class Own(KNNMemory):
        def search(self, *args, **kwargs):
            seen.append(threading.current_thread().name)
            return super().search(*args, **kwargs)

    seen = []
    KNNLMForCausalLM(tiny.gpt2(), Own(store, k=8, temperature=5.0))(IDS)
    assert len(seen) == 1
    assert seen[0].startswith("knnlm-hf")


def test_with_gradients_and_many_tokens_it_waits(store):
    model = tiny.gpt2()
    memory = Watched(store, k=8)
    knn = KNNLMForCausalLM(model, memory)
    knn(IDS, labels=IDS).loss.backward()
    assert model.transformer.h[0].mlp.c_fc.weight.grad is not None
    with torch.no_grad():
        knn(IDS.repeat(1, 6))
    assert set(memory.asked_by) == {threading.current_thread().name}


class WatchedHead(MultiEmbeddingHead):
    """Records which thread asked."""

    def log_probs(self, hidden):
        self.__dict__.setdefault("asked_by", []).append(threading.current_thread().name)
        return super().log_probs(hidden)


@pytest.fixture
def two_threads(monkeypatch):
    """On a CPU where a head is asked ahead."""
    monkeypatch.setattr(ahead, "usual_is_slow", lambda: True)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("layer", ["att", "final"])
def test_a_head_answers_ahead_too(layer, monkeypatch):
    model = tiny.gpt2()
    head = WatchedHead(24, tiny.VOCAB, n=2, layer=layer)
    knn = KNNLMForCausalLM(model, head, lmbda=0.6)
    assert not head.training  # as its model is
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        early = knn(IDS).logits
    tokens = knn.generate(IDS, **options)
    assert all(name.startswith("knnlm-hf") for name in head.asked_by)
    head.asked_by.clear()
    monkeypatch.setattr(ahead, "_MOST_TOKENS", 0)
    with torch.no_grad():
        torch.testing.assert_close(knn(IDS).logits, early)
    assert torch.equal(knn.generate(IDS, **options), tokens)
    assert set(head.asked_by) == {threading.current_thread().name}


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("why", ["training", "autocast", "gradients", "one thread", "cpu"])
def test_a_head_waits_where_another_thread_would_differ_or_not_pay(why, monkeypatch):
    monkeypatch.setattr(ahead, "usual_is_slow", lambda: why != "cpu")
    head = WatchedHead(24, tiny.VOCAB, n=1)
    knn = KNNLMForCausalLM(tiny.gpt2(), head)
    knn.train(why == "training")
    if why == "one thread":
        torch.set_num_threads(1)
    with (
        torch.set_grad_enabled(why == "gradients"),
        torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"),
    ):
        knn(IDS)
    assert set(head.asked_by) == {threading.current_thread().name}


def test_threads_are_given_back(store):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        knn = KNNLMForCausalLM(tiny.gpt2(), KNNMemory(store))
        with torch.no_grad():
            knn(IDS)
        assert torch.get_num_threads() == 3
        begun_later = []
        thread = threading.Thread(target=lambda: begun_later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert begun_later == [3]
    finally:
        torch.set_num_threads(before)


def test_a_thread_that_begins_during_a_step_has_its_threads_too(store):
    """Else each request would begin with one less than the one before it."""
    began, go_on, seen = threading.Event(), threading.Event(), []

    def stop_in_between(*_):
        began.set()
        go_on.wait(10)

    def step(model):
        with torch.no_grad():
            KNNLMForCausalLM(model, KNNMemory(store))(IDS)

    slow_model = tiny.gpt2()
    slow_model.lm_head.register_forward_pre_hook(stop_in_between)

    def request():
        seen.append(torch.get_num_threads())
        step(tiny.gpt2())
        seen.append(torch.get_num_threads())

    def in_a_thread(work, join=True):
        thread = threading.Thread(target=work)
        thread.start()
        if join:
            thread.join()
        return thread

    # All workers are there: one that begins would mend what new threads start with.
    together = threading.Barrier(pool.size)
    for task in [pool.submit(together.wait, 10) for _ in range(pool.size)]:
        task.result()
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        slow = in_a_thread(lambda: step(slow_model), join=False)
        began.wait(10)
        in_a_thread(request)
        go_on.set()
        slow.join()
        assert seen == [3, 4]
        in_a_thread(lambda: seen.append(torch.get_num_threads()))
        assert seen[-1] == 4
        torch.set_num_threads(3)  # on purpose: no thread is sparing one
        in_a_thread(request)
        assert seen[-2:] == [3, 3]
    finally:
        torch.set_num_threads(before)


def test_an_error_of_the_memory_reaches_the_caller(store):
    class Broken(KNNMemory):
        def log_probs(self, hidden):
            raise KNNLMError("out of order")

    knn = KNNLMForCausalLM(tiny.gpt2(), Broken(store))
    before = torch.get_num_threads()
    with torch.no_grad(), pytest.raises(KNNLMError, match="out of order"):
        knn(IDS)
    assert torch.get_num_threads() == before


def test_lambda_zero_asks_nothing(store):
    memory = Watched(store)
    knn = KNNLMForCausalLM(tiny.gpt2(), memory, lmbda=0.0)
    with torch.no_grad():
        knn(IDS)
    assert "asked_by" not in memory.__dict__
