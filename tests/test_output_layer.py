"""The output layer of a wrapper's step: another way to multiply, and nothing else."""

import copy
import pickle
import threading

import pytest
import tiny
import torch
from tiny_memory import head_of
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from knnlm_hf import Datastore, KNNLMForCausalLM, KNNMemory, MultiEmbeddingHead
from knnlm_hf.capture import capturing, find
from knnlm_hf.memory import product
from knnlm_hf.modeling import output_layer

IDS = torch.tensor([[5, 6, 7, 8]])
OPTIONS = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def products(monkeypatch):
    """How many states each quick product had; layers of any size are quick."""
    seen = []
    times_rows = output_layer.times_rows

    def watched(hidden, rows):
        seen.append(len(hidden))
        return times_rows(hidden, rows)

    monkeypatch.setattr(output_layer, "_LARGE", 0)
    monkeypatch.setattr(product, "usual_is_slow", lambda: True)
    monkeypatch.setattr(output_layer, "times_rows", watched)
    return seen


def wrapped(model, **settings):
    return KNNLMForCausalLM(model, head_of(model), **{"lmbda": 0.3, **settings})


@torch.no_grad()
def test_it_says_what_the_layer_says(products):
    model = tiny.gpt2()
    knn = wrapped(model)
    for count in (1, 4, 8):
        ids = torch.arange(2, 2 + count)[None]
        products.clear()
        with capturing(find(model, "transformer.ln_f")) as collector:
            logits = knn(ids).logits
            heard = collector.raw
        expected = 0.7 * (heard.double() @ model.lm_head.weight.double().T).softmax(-1)
        said = knn.memory.log_probs(knn_states(model, knn, ids)).double().exp()
        torch.testing.assert_close(logits.double().exp(), expected + 0.3 * said)
        assert products == [count]


def knn_states(model, knn, ids):
    with capturing(knn.capture_point) as collector:
        model(ids)
    return collector.raw


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 9), (3, 3)])
def test_many_states_are_left_to_the_layer(products, shape):
    wrapped(tiny.gpt2())(torch.arange(2, 11).view(shape))
    assert products == []


def test_generation_is_the_same(products, monkeypatch):
    knn = wrapped(tiny.gpt2())
    greedy, beams = knn.generate(IDS, **OPTIONS), knn.generate(IDS, num_beams=3, **OPTIONS)
    assert {1, 3} <= set(products)
    monkeypatch.setattr(output_layer, "_LARGE", 1 << 60)
    assert torch.equal(knn.generate(IDS, **OPTIONS), greedy)
    assert torch.equal(knn.generate(IDS, num_beams=3, **OPTIONS), beams)


@torch.no_grad()
def test_a_bias_is_added(products):
    model = tiny.gpt2()
    knn = wrapped(model, lmbda=1e-9)
    without = knn(IDS).logits.exp()
    model.lm_head.bias = nn.Parameter(torch.linspace(-9, 9, tiny.VOCAB))
    torch.testing.assert_close(knn(IDS).logits.exp(), model(IDS).logits.softmax(-1))
    assert not torch.allclose(knn(IDS).logits.exp(), without)
    assert products == [4, 4, 4]


@torch.no_grad()
def test_elsewhere_the_layer_works_to_the_bit(products):
    """The model alone, the wrapper without retrieval or without weight, and another thread."""
    model = tiny.gpt2()
    expected = model(IDS).logits
    knn = wrapped(model)
    knn(IDS)
    assert products == [4]
    assert torch.equal(model(IDS).logits, expected)
    with knn.disable_retrieval():
        assert torch.equal(knn(IDS).logits, expected)
    knn.lmbda = 0.0
    assert torch.equal(knn(IDS).logits, expected.log_softmax(-1))
    found = []

    @torch.no_grad()
    def work():
        found.append(knn.unwrap()(IDS).logits)
        with knn.disable_retrieval():
            found.append(knn(IDS).logits)

    with output_layer.InStep(knn.lm_head):
        other = threading.Thread(target=work)
        other.start()
        other.join()
        assert products == [4]
    assert len(found) == 2
    assert all(torch.equal(logits, expected) for logits in found)


@torch.no_grad()
def test_another_wrapper_inside_a_step_is_not_in_it(products):
    model = tiny.gpt2()
    outer, inner = wrapped(model), wrapped(model)
    expected, seen = model(IDS).logits, []

    def ask(*_):
        with inner.disable_retrieval():
            seen.append(inner(IDS).logits)

    handle = outer.transformer.wte.register_forward_pre_hook(lambda *_: handle.remove() or ask())
    outer(IDS)
    assert torch.equal(seen[0], expected)
    assert products == [4]


@torch.no_grad()
def test_it_is_the_same_layer(products):
    model = tiny.gpt2()
    layer = model.lm_head
    knn = wrapped(model)
    assert type(knn.lm_head) is output_layer.StepLinear
    assert type(model.lm_head) is nn.Linear
    assert knn.lm_head.weight is layer.weight
    assert knn.unwrap().lm_head is layer
    assert list(knn.state_dict()) == list(model.state_dict())
    layer.weight = nn.Parameter(torch.zeros_like(layer.weight))
    assert knn(IDS).logits.isfinite().all()
    uniform = torch.full((1, 4, tiny.VOCAB), 1 / tiny.VOCAB)
    knn.lmbda = 1e-9
    torch.testing.assert_close(knn(IDS).logits.exp(), uniform)
    knn.train()
    assert layer.training
    knn.resize_token_embeddings(tiny.VOCAB + 3)
    assert knn(IDS).logits.shape == (1, 4, tiny.VOCAB + 3)
    assert knn.unwrap()(IDS).logits.shape == (1, 4, tiny.VOCAB + 3)


def test_a_small_layer_is_the_very_same():
    model = tiny.gpt2()
    assert wrapped(model).lm_head is model.lm_head


def test_with_gradients_it_waits(products):
    model = tiny.gpt2()
    knn = wrapped(model)
    knn(IDS, labels=IDS).loss.backward()
    assert model.lm_head.weight.grad is not None
    assert products == []


@torch.no_grad()
@pytest.mark.parametrize("on", ["model", "wrapper"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["pre", "post", "forward", "everywhere"])
def test_hooks_of_others_see_everything(products, kind, when, on):
    model = tiny.gpt2()
    knn = wrapped(model)
    expected = knn(IDS).logits
    if when == "before":
        model = tiny.gpt2()
    seen = []
    layer = model.lm_head if on == "model" or when == "before" else knn.lm_head

    def see(module, args, output=None):
        if isinstance(module, nn.Linear):
            seen.append(args[0].shape)
            return None if output is None else output + 1.0
        return None

    def forward(hidden):
        seen.append(hidden.shape)
        return nn.functional.linear(hidden, layer.weight)

    handle = None
    if kind == "pre":
        layer.register_forward_pre_hook(see)
    elif kind == "post":
        layer.register_forward_hook(see)
    elif kind == "forward":
        layer.forward = forward
    else:
        handle = register_module_forward_hook(see)
    knn = wrapped(model) if when == "before" else knn
    products.clear()
    try:
        logits = knn(IDS).logits
    finally:
        if handle is not None:
            handle.remove()
    assert seen == [(1, 4, 24)]
    assert products == ([] if kind == "forward" else [4])
    torch.testing.assert_close(logits, expected)  # what a hook adds to all, softmax takes away


@torch.no_grad()
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("layer", ["final", "lm_head"])
def test_what_passes_is_still_captured(products, when, layer):
    model = tiny.gpt2()
    knn = wrapped(model)
    if when == "after":
        knn(IDS)
    point = find(model, layer)
    with capturing(point) as collector:
        model(IDS)
        expected = collector.raw
        knn(IDS)
    torch.testing.assert_close(collector.raw, expected)
    assert products[-1] == 4


@torch.no_grad()
def test_a_memory_of_the_logits(products):
    model = tiny.gpt2()
    head = MultiEmbeddingHead(tiny.VOCAB, tiny.VOCAB, layer="lm_head")
    logits = KNNLMForCausalLM(model, head, lmbda=0.3)(IDS).logits
    said = head.log_probs(model(IDS).logits)
    expected = 0.7 * model(IDS).logits.softmax(-1) + 0.3 * said.exp()
    torch.testing.assert_close(logits.exp(), expected)
    assert products == [4]


class Scaled(Tensor):
    """A weight of a class of its own, as quantised ones have."""


@torch.no_grad()
def test_weights_of_another_kind_are_left_to_the_layer(products):
    model = tiny.gpt2()
    knn = wrapped(model)
    expected = knn(IDS).logits
    plain = model.lm_head.weight.detach().clone()
    products.clear()
    for weight in (plain.as_subclass(Scaled), plain.to_sparse_csr()):
        model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
        for ids in (IDS, IDS[:, :1]):
            torch.testing.assert_close(knn(ids).logits, expected[:, : ids.shape[1]])
    assert products == []


@torch.no_grad()
@pytest.mark.usefixtures("products")
def test_traced_by_jit():
    model = tiny.gpt2()
    knn = wrapped(model)
    for ids in (IDS, IDS[:, :1]):
        layer = torch.jit.trace(knn.lm_head, torch.randn(1, ids.shape[1], 24))
        states = torch.randn(1, ids.shape[1], 24)
        with output_layer.InStep(knn.lm_head):
            again = torch.jit.trace(knn.lm_head, states)
        torch.testing.assert_close(layer(states), again(states))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_left_to_the_layer(products, dtype):
    assert wrapped(tiny.gpt2().to(dtype))(IDS).logits.dtype == torch.float32
    assert products == []


@torch.no_grad()
def test_a_model_that_was_used_is_copied_and_saved_as_before(products, tmp_path):
    model = tiny.gpt2()
    knn = wrapped(model)
    expected = knn(IDS).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(knn)):
        assert torch.equal(wrapped(other)(IDS).logits, expected)
        assert type(wrapped(other).unwrap().lm_head) is nn.Linear
    assert len(products) == 4
    knn.save_pretrained(tmp_path / "saved", save_base=True)
    loaded = KNNLMForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(loaded(IDS).logits, expected)
    model.resize_token_embeddings(tiny.VOCAB + 3)
    assert model(IDS).logits.shape == (1, 4, tiny.VOCAB + 3)
    assert wrapped(model)(IDS).logits.shape == (1, 4, tiny.VOCAB + 3)


@torch.no_grad()
def test_compiled_it_says_the_same(products):
    model = tiny.gpt2()
    knn = wrapped(model)
    expected = knn(IDS).logits
    alone = torch.compile(model, backend="eager", fullgraph=False)(IDS).logits
    torch.testing.assert_close(alone, model(IDS).logits)
    products.clear()
    torch.testing.assert_close(torch.compile(knn, backend="eager")(IDS).logits, expected)
    assert products == []


@torch.no_grad()
def test_an_error_in_the_layer_leaves_nothing_behind(products):
    model = tiny.gpt2()
    knn = wrapped(model)
    expected = knn(IDS).logits
    handle = model.transformer.ln_f.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        knn(IDS)
    handle.remove()
    assert torch.equal(knn(IDS).logits, expected)
    assert output_layer._in_step.get() is None


def test_it_is_for_a_store_too(products, tmp_path):
    model = tiny.gpt2()
    store = Datastore.build(model, tiny.corpus(), tmp_path / "s", progress=False)
    KNNLMForCausalLM(model, KNNMemory(store, k=4)).generate(IDS, **OPTIONS)
    assert products[0] == 1
    assert set(products) == {1}
