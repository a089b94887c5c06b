"""Every architecture against plain forward + plain hook + float64 brute force."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import reference
import torch
from architectures import ARCHITECTURES, D, V, tiny
from marked import nothing_stays_marked
from tiny_memory import head_of, memory_of
from torch import Tensor
from transformers import PreTrainedModel

from knnlm_hf.capture import capturing, find, states
from knnlm_hf.errors import CaptureError
from knnlm_hf.forwards import can_share
from knnlm_hf.memory import CacheMemory, product
from knnlm_hf.modeling import KNNLMForCausalLM, output_layer
from knnlm_hf.modeling.generating import _only_tokens
from knnlm_hf.parallel import two_at_a_time

LMBDA = 0.6
NO_FEED_FORWARD = {t for t, path in reference.FEED_FORWARD.items() if path is None}
KEEPS_STATES = {"recurrent_gemma"}
WRONG_CACHE = {"rwkv"}  # its own cached generation is not its own uncached one
TOLERANCE = {"rtol": 0, "atol": 2e-4}
LAYERS = ("att", "ffn", "final", "path")


@dataclass
class Case:
    model_type: str
    model: PreTrainedModel
    input_ids: Tensor

    def layer(self, layer: str) -> str:
        """The layer to ask for: a named path is that of the first layer's feed-forward."""
        if layer == "path":
            path = reference.FEED_FORWARD.get(self.model_type, "model.layers.1.mlp")
            return (path.rsplit(".", 1)[0] if path else "backbone.layers.1").replace(".1", ".0")
        if layer == "att" and self.model_type in NO_FEED_FORWARD:
            pytest.skip("no feed-forward: refusal is tested")
        return layer

    def wrapped(self, layer: str, **settings: Any) -> tuple[KNNLMForCausalLM, Any]:
        where = reference.place(self.model, self.model_type, layer)
        memory = memory_of(self.model, self.model_type, layer, **settings)
        return KNNLMForCausalLM(self.model, memory, LMBDA), where

    @property
    def best_layer(self) -> str:
        return "ffn" if self.model_type in NO_FEED_FORWARD else "att"


@pytest.fixture(autouse=True)
def quick_output_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """These models are small, whose output layers would be left as they are; so would Intel's."""
    monkeypatch.setattr(output_layer, "_LARGE", 0)
    monkeypatch.setattr(product, "usual_is_slow", lambda: True)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request: pytest.FixtureRequest) -> Case:
    model = tiny(request.param)
    generator = torch.Generator().manual_seed(3)
    return Case(request.param, model, torch.randint(3, V, (3, 7), generator=generator))


def test_there_are_enough() -> None:
    assert len(ARCHITECTURES) >= 45


@pytest.mark.parametrize("layer", LAYERS)
def test_states(case: Case, layer: str) -> None:
    """Captured in a whole forward, and by one that stops early: the plain hook's states."""
    layer = case.layer(layer)
    truth = reference.states(
        case.model, reference.place(case.model, case.model_type, layer), case.input_ids
    )
    point = find(case.model, layer)
    with torch.no_grad(), capturing(point) as heard:
        case.model(case.input_ids)
    found = heard.states(len(case.input_ids))
    assert found is not None
    assert torch.equal(found, truth)
    assert torch.equal(states(case.model, point, case.input_ids), truth)
    assert truth.shape == (3, 7, D)


@pytest.mark.parametrize("layer", LAYERS)
@torch.no_grad()
def test_full_logits(case: Case, layer: str) -> None:
    layer = case.layer(layer)
    knn, where = case.wrapped(layer)
    plain, hidden = reference.run(case.model, where, case.input_ids)
    truth = reference.mixture(plain.logits, hidden, knn.memory, LMBDA)
    logits = knn(case.input_ids).logits
    assert logits.dtype == torch.float32
    np.testing.assert_allclose(logits.numpy(), truth, **TOLERANCE)
    lm = reference.log_softmax(plain.logits.double().numpy())
    assert np.abs(truth - lm).max() > 0.1  # retrieval does something here
    assert knn.memory.asked == [(3, 7, D)]


KEEPS = {
    "last": 2,
    "positions": torch.tensor([5, 0, 6, 3, 4, 1, 2]),  # as many as there are: a permutation
    "rows": torch.tensor([[1, 4], [0, 6], [3, 2]]),
    "mask": torch.tensor([[1, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 1], [0, 1, 0, 0, 0, 0, 0]]) > 0,
}


@pytest.mark.parametrize("layer", ["att", "final"])
@pytest.mark.parametrize("form", KEEPS)
@torch.no_grad()
def test_logits_to_keep(case: Case, form: str, layer: str) -> None:
    """Peers' bug 4: with positions left out, states and logits still belong together."""
    if "logits_to_keep" not in inspect.signature(case.model.forward).parameters:
        pytest.skip("the model has no logits_to_keep")
    layer = case.best_layer if layer == "att" else layer
    knn, _ = case.wrapped(layer)
    keep = KEEPS[form]
    whole = knn(case.input_ids).logits
    rows = torch.arange(3)[:, None]
    truth = {
        "last": lambda: whole[:, -2:],
        "positions": lambda: whole[:, keep],
        "rows": lambda: whole[rows, keep],
        "mask": lambda: whole[keep],
    }[form]()
    knn.memory.asked.clear()
    logits = knn(case.input_ids, logits_to_keep=keep).logits
    assert logits.shape == truth.shape
    torch.testing.assert_close(logits, truth, **TOLERANCE)
    assert knn.memory.asked == [(*truth.shape[:-1], D)]  # nothing else is searched


@torch.no_grad()
def test_loss_and_tuple(case: Case) -> None:
    knn, where = case.wrapped(case.best_layer)
    labels = case.input_ids.clone()
    labels[0, :3] = -100
    labels[2, 6] = -100
    plain, hidden = reference.run(case.model, where, case.input_ids)
    mixed = reference.mixture(plain.logits, hidden, knn.memory, LMBDA)
    output = knn(case.input_ids, labels=labels)
    assert output.loss.item() == pytest.approx(reference.nll(mixed, labels), abs=1e-4)
    as_tuple = knn(case.input_ids, labels=labels, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], output.loss)
    assert torch.equal(as_tuple[1], output.logits)
    plain_tuple = case.model(case.input_ids, return_dict=False)
    assert len(as_tuple) == 1 + len(plain_tuple)


@torch.no_grad()
def test_greedy_tokens(case: Case) -> None:
    """Each step of generate is the mixture of a plain, uncached forward over the text so far."""
    knn, where = case.wrapped(case.best_layer, k=48)  # no cut at k: noise moves nothing by a jump
    new = 4
    made = knn.generate(
        case.input_ids,
        attention_mask=torch.ones_like(case.input_ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        use_cache=case.model_type not in WRONG_CACHE,
        return_dict_in_generate=True,
        output_logits=True,
    )
    plain, hidden = reference.run(case.model, where, made.sequences)
    hidden = hidden.reshape(*made.sequences.shape, -1)
    mixed = reference.mixture(plain.logits, hidden, knn.memory, LMBDA)[:, 6 : 6 + new]
    steps = torch.stack(made.logits, dim=1).numpy()
    np.testing.assert_allclose(steps, mixed, rtol=0, atol=2e-3)
    best = np.sort(mixed, axis=-1)
    clear = best[..., -1] - best[..., -2] > 4e-3
    tokens = made.sequences[:, 7:].numpy()
    assert clear.any()
    assert (tokens == mixed.argmax(axis=-1))[clear].all()


@torch.no_grad()
def test_without_retrieval_it_is_the_model(case: Case) -> None:
    knn, _ = case.wrapped(case.best_layer)
    plain = case.model(case.input_ids, labels=case.input_ids)
    with knn.disable_retrieval():
        off = knn(case.input_ids, labels=case.input_ids)
    assert torch.equal(off.logits, plain.logits)
    assert torch.equal(off.loss, plain.loss)
    knn.lmbda = 0.0
    zero = knn(case.input_ids)
    assert torch.equal(zero.logits, plain.logits.float().log_softmax(dim=-1))
    assert knn.memory.asked == []
    knn.lmbda = 1e-7
    almost = knn(case.input_ids)
    lm = plain.logits.float().log_softmax(dim=-1)
    torch.testing.assert_close(almost.logits.exp(), lm.exp(), rtol=0, atol=1e-5)


def test_no_feed_forward_refuses_att(case: Case) -> None:
    if case.model_type not in NO_FEED_FORWARD:
        assert find(case.model, "att").side == "input"
        return
    with pytest.raises(CaptureError, match=r"no feed-forward .*choose 'ffn', 'final'"):
        find(case.model, "att")


def test_two_threads_run_it_as_one_does(case: Case, two_threads: None) -> None:
    """`Datastore.build` runs halves of a batch side by side: nothing may be kept in the model."""
    if not can_share(case.model):
        assert case.model_type in KEEPS_STATES
        return
    point = find(case.model, case.best_layer)
    generator = torch.Generator().manual_seed(5)
    shapes = [(1 + n % 3, 3 + 4 * n % 11) for n in range(12)]
    batches = [torch.randint(3, V, shape, generator=generator) for shape in shapes]

    def work(input_ids: Tensor) -> Tensor:
        return states(case.model, point, input_ids)

    alone = [work(input_ids) for input_ids in batches]
    for one, other in zip(two_at_a_time(work, batches), alone, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_the_text_itself_in_a_kv_cache_is_the_whole_text(case: Case) -> None:
    """What the layer of states in the cache holds, step by step, is what one forward reads."""
    memory = CacheMemory.of(case.model, case.best_layer, temperature=8.0)
    knn = KNNLMForCausalLM(case.model, memory, LMBDA)
    new = 4
    made = knn.generate(
        case.input_ids,
        attention_mask=torch.ones_like(case.input_ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        use_cache=case.model_type not in WRONG_CACHE,
        return_dict_in_generate=True,
        output_logits=True,
    )
    with torch.no_grad():
        whole = knn(made.sequences, use_cache=False).logits[:, -new - 1 : -1]
        alone = case.model(made.sequences).logits[:, -new - 1 : -1].float().log_softmax(dim=-1)
    steps = torch.stack(made.logits, dim=1)
    torch.testing.assert_close(steps, whole, rtol=0, atol=2e-3)
    assert not torch.allclose(steps, alone, rtol=0, atol=0.05)


def test_nothing_of_inference_mode_is_left(case: Case) -> None:
    """Neither in the model, which keeps one thing or another of a call, nor anywhere else."""
    head = head_of(case.model, case.best_layer)
    knn = KNNLMForCausalLM(case.model, head, LMBDA)
    settings: dict[str, Any] = {
        "attention_mask": torch.ones_like(case.input_ids),
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "do_sample": False,
        "use_cache": case.model_type not in WRONG_CACHE,
    }
    assert _only_tokens(knn, settings)
    with nothing_stays_marked():
        tokens = knn.generate(case.input_ids, **settings)
    plain = knn.generate(case.input_ids, **settings, return_dict_in_generate=True)
    assert torch.equal(tokens, plain.sequences)
    knn(tokens, labels=tokens, use_cache=False).loss.backward()
    knn.zero_grad()
