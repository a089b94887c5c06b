"""Searching while the model goes on changes nothing but the time."""

import copy
import itertools
import shutil
import threading
from types import SimpleNamespace
from typing import ClassVar

import faiss
import pytest
import tiny
import torch
from tiny_memory import head_of

from knnlm_hf import Datastore, KNNLMForCausalLM, KNNMemory, MultiEmbeddingHead
from knnlm_hf.errors import KNNLMError
from knnlm_hf.index import FaissIndex
from knnlm_hf.memory import HybridMemory, neighbours
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
    monkeypatch.setattr(ahead, "usual_is_slow", lambda: True)
    memory = KNNMemory(indexed, temperature=5.0, index=index, **{"k": 7, **settings})
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
@pytest.mark.parametrize("kind", [KNNMemory, HybridMemory])
@pytest.mark.parametrize("index", ["exact", "IVF2,SQ4", "IVF2,SQ4,Refine(keys)"])
def test_a_search_that_takes_all_cores_waits_for_them(indexed, kind, index, monkeypatch):
    """Where the model gains as much by them; else one is spared for it."""
    memory = kind(indexed, k=8, temperature=5.0, index=index)
    knn = KNNLMForCausalLM(tiny.gpt2(), memory, lmbda=0.6)
    searched = threads_of(monkeypatch, memory.index, "search", "_call")
    if index == "IVF2,SQ4":
        monkeypatch.setattr(memory.index, "_has_shares", True)
    before, here = torch.get_num_threads(), threading.current_thread().name
    try:
        for threads, model_is_slow in itertools.product((1, 2), (False, True)):
            torch.set_num_threads(threads)
            monkeypatch.setattr(ahead, "usual_is_slow", lambda slow=model_is_slow: slow)
            searched.clear()
            knn(IDS[:, :1])
            waits = threads > 1 and not model_is_slow and index == "IVF2,SQ4"
            assert {name == here for name in searched} == {waits}
    finally:
        torch.set_num_threads(before)


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
@pytest.mark.parametrize("index", ["exact", "IVF2,SQ4"])
def test_an_earlier_pass_that_cannot_be_searched_with(indexed, index):
    """A later one replaces it, whatever was wrong with it."""
    model = tiny.gpt2()
    knn = KNNLMForCausalLM(model, KNNMemory(indexed, k=8, temperature=5.0, index=index), 0.6)
    expected, block = knn(IDS[:, :1]).logits, model.transformer.h[-1]
    norm = block.ln_2.forward

    def passed_twice(states):
        block.mlp(norm(states) * torch.nan)
        return norm(states)

    block.ln_2.forward = passed_twice
    torch.testing.assert_close(knn(IDS[:, :1]).logits, expected)


@pytest.mark.parametrize("kind", [KNNMemory, HybridMemory])
def test_what_is_taken_from_the_data_is_taken_once(store, kind, monkeypatch):
    memory, taken = kind(store, k=8, index="exact"), []
    monkeypatch.setattr(kind, "_temperature_from_data", lambda memory: taken.append(1) or 5.0)
    KNNLMForCausalLM(tiny.gpt2(), memory).generate(IDS, max_new_tokens=4, pad_token_id=0)
    assert taken == [1]


@torch.no_grad()
@pytest.mark.parametrize("index", ["exact", "IVF2,SQ4", "IVF2,SQ4,Refine(keys)"])
def test_one_that_searches_can_be_asked_again(indexed, index):
    memory = KNNMemory(indexed, k=8, temperature=5.0, index=index)
    states = indexed.keys[7:8].float()
    expected = memory.log_probs(states)
    searching = memory.searching(states, pool.submit)
    for _ in range(2):
        torch.testing.assert_close(searching.log_probs(states), expected)
    assert memory.log_probs(states * 0.9).equal(expected) is False  # it was another one


OWN = {
    "_near": lambda self, hidden: super(type(self), self)._near(hidden * 0.2),
    "_found": lambda self, queries, *rest, **more: super(type(self), self)._found(
        queries * 0.2, *rest, **more
    ),
    "log_probs": lambda self, hidden: super(type(self), self).log_probs(hidden * 0.2),
    "scored": lambda self, near: super(type(self), self).scored(near) * 0.2,
}


@torch.no_grad()
@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("kind", [KNNMemory, HybridMemory])
def test_a_derived_memory_goes_its_own_way(store, kind, name, monkeypatch):
    own = type("Own", (kind,), {name: OWN[name]})
    knn = KNNLMForCausalLM(tiny.gpt2(), own(store, k=8, temperature=5.0, index="exact"), 0.6)
    early = knn(IDS[:, :1]).logits
    monkeypatch.setattr(ahead, "_MOST_TOKENS", 0)
    torch.testing.assert_close(knn(IDS[:, :1]).logits, early)
    plain = KNNLMForCausalLM(tiny.gpt2(), kind(store, k=8, temperature=5.0, index="exact"), 0.6)
    assert not torch.allclose(plain(IDS[:, :1]).logits, early)


@torch.no_grad()
def test_a_memory_that_reads_and_can_search_before(store, monkeypatch):
    class Finding(HybridMemory):
        found_by: ClassVar[list[str]] = []
        near = None

        def finding(self, hidden):
            self.found_by.append(threading.current_thread().name)
            finder = copy.copy(self)
            finder.near = super()._near(hidden)
            return finder

        def _near(self, hidden):
            return super()._near(hidden) if self.near is None else self.near

    memory = Finding(store, k=8, temperature=5.0, match_weight=1.0, index="exact")
    knn = KNNLMForCausalLM(tiny.gpt2(), memory, lmbda=0.6)
    early = knn(IDS).logits
    assert len(memory.found_by) == 1
    assert memory.found_by[0].startswith("knnlm-hf")
    monkeypatch.setattr(ahead, "_MOST_TOKENS", 0)
    torch.testing.assert_close(knn(IDS).logits, early)
    assert len(memory.found_by) == 1


@torch.no_grad()
@pytest.mark.parametrize("name", ["search", "_search_unordered"])
def test_a_derived_index_goes_its_own_way(store, name, monkeypatch):
    def farther(self, *args, **options):
        similarity, ids = getattr(FaissIndex, name)(self, *args, **options)
        return similarity * 0.1, ids

    own = type("Own", (FaissIndex,), {name: farther})
    flat = faiss.IndexFlatL2(store.dim)
    flat.add(store.keys[:].float().numpy())
    memory = KNNMemory(store, k=8, temperature=5.0, index=own(flat))
    knn = KNNLMForCausalLM(tiny.gpt2(), memory, lmbda=0.6)
    early = knn(IDS[:, :1]).logits
    monkeypatch.setattr(ahead, "_MOST_TOKENS", 0)
    torch.testing.assert_close(knn(IDS[:, :1]).logits, early)


@torch.no_grad()
def test_a_memory_whose_attributes_are_its_own(store):
    """Not its class's: a namespace is a memory too."""
    memory = KNNMemory(store, k=8, temperature=5.0)
    names = ("layer", "hidden_size", "vocab_size", "log_probs", "token_log_probs", "search")
    namespace = SimpleNamespace(**{name: getattr(memory, name) for name in names})
    said = [KNNLMForCausalLM(tiny.gpt2(), one)(IDS).logits for one in (memory, namespace)]
    assert torch.equal(*said)


@torch.no_grad()
def test_a_memory_that_hands_on_to_another(store):
    """What it hands on to answers, whatever it is, in a step of one token too."""
    inner = KNNMemory(store, k=8, temperature=5.0)
    names = ("layer", "hidden_size", "vocab_size", "log_probs", "token_log_probs")
    outer = type(
        "Outer", (), {name: property(lambda _, n=name: getattr(inner, n)) for name in names}
    )
    replaced = KNNMemory(store, k=2, temperature=1.0)
    replaced.log_probs = inner.log_probs
    expected, *others = (
        KNNLMForCausalLM(tiny.gpt2(), one)(IDS[:, :1]).logits for one in (inner, outer(), replaced)
    )
    for got in others:
        torch.testing.assert_close(got, expected)


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
