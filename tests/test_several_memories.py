"""Several memories in one mixture, and heads that follow their wrapper."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import tiny as tiny_gpt2
import torch
from architectures import D, V, tiny
from tiny_memory import KINDS, TinyMemory, head_of, memory_of, memory_of_kind
from torch import Tensor, nn

from knnlm_hf import Datastore, KNNLMForCausalLM, KNNMemory
from knnlm_hf.errors import KNNLMError, SettingError
from knnlm_hf.sources import sources

IDS = torch.tensor([[3, 9, 27, 17, 51], [5, 25, 61, 49, 53]])
CLOSE = {"rtol": 0, "atol": 2e-4}


class Certain:
    """A memory that gives one token all of its probability, or says nothing at all."""

    layer, hidden_size, vocab_size = "att", D, V

    def __init__(self, token: int | None) -> None:
        self.token = token

    def log_probs(self, hidden: Tensor) -> Tensor:
        answer = torch.full((*hidden.shape[:-1], V), -torch.inf)
        if self.token is not None:
            answer[..., self.token] = 0
        return answer

    def token_log_probs(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        return self.log_probs(hidden).gather(-1, tokens[..., None])[..., 0]


def three(model_type: str = "gpt2") -> tuple[Any, list[Any], list[float]]:
    """A head and two searches, each on a layer of its own."""
    model = tiny(model_type)
    memories = [
        head_of(model, "ffn"),
        memory_of(model, model_type, "att"),
        memory_of(model, model_type, "final", k=5),
    ]
    return model, memories, [0.2, 0.3, 0.1]


# --- the mixture ----------------------------------------------------------------------------


def test_hand_worked_mixture() -> None:
    """P = 0.7 · P_LM + 0.2 · (certain of token 7) + 0.1 · (certain of token 9)."""
    model = tiny("gpt2")
    knn = KNNLMForCausalLM(model, [Certain(7), Certain(9)], lmbda=[0.2, 0.1])
    expected = 0.7 * model(IDS).logits.softmax(dim=-1)
    expected[..., 7] += 0.2
    expected[..., 9] += 0.1
    torch.testing.assert_close(knn(IDS).logits.exp(), expected)


def test_what_has_nothing_to_say_gives_its_share_to_the_model_alone() -> None:
    """P = 0.8 · P_LM + 0.2 · P_1: the silent memory's 0.5 is the model's, not the other's."""
    model = tiny("gpt2")
    silent = KNNLMForCausalLM(model, [Certain(7), Certain(None)], lmbda=[0.2, 0.5])
    alone = KNNLMForCausalLM(model, Certain(7), lmbda=0.2)
    torch.testing.assert_close(silent(IDS).logits, alone(IDS).logits)
    nobody = KNNLMForCausalLM(model, [Certain(None), Certain(None)], lmbda=[0.2, 0.5])
    assert torch.equal(nobody(IDS).logits, model(IDS).logits.log_softmax(dim=-1))


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "opt"])
def test_memories_of_different_layers(model_type: str) -> None:
    model, memories, lmbdas = three(model_type)
    knn = KNNLMForCausalLM(model, memories, lmbdas)
    parts = []
    for memory, lmbda in zip(memories, lmbdas, strict=True):
        place = reference.place(model, model_type, memory.layer)
        plain, states = reference.run(model, place, IDS)
        parts.append((states.reshape(*IDS.shape, -1), memory, lmbda))
    truth = reference.mixture_of(plain.logits, parts)
    output = knn(IDS, labels=IDS)
    np.testing.assert_allclose(output.logits.detach().numpy(), truth, **CLOSE)
    assert output.loss.item() == pytest.approx(reference.nll(truth, IDS), abs=1e-4)
    kept = knn(IDS, logits_to_keep=2).logits.detach().numpy()
    np.testing.assert_allclose(kept, truth[:, -2:], **CLOSE)
    with knn.disable_retrieval():
        assert torch.equal(knn(IDS).logits, plain.logits)


def test_the_order_does_not_matter_and_a_share_can_be_split() -> None:
    model, (head, near, other), _ = three()
    one = KNNLMForCausalLM(model, [head, near, other], [0.2, 0.3, 0.1])(IDS).logits
    two = KNNLMForCausalLM(model, [other, head, near], [0.1, 0.2, 0.3])(IDS).logits
    torch.testing.assert_close(one, two)
    whole = KNNLMForCausalLM(model, near, 0.3)(IDS).logits
    halves = KNNLMForCausalLM(model, [near, near], [0.1, 0.2])(IDS).logits
    torch.testing.assert_close(whole, halves)


def test_a_memory_without_share_is_not_asked() -> None:
    model, memories, _ = three()
    knn = KNNLMForCausalLM(model, memories, [0.2, 0.0, 0.1])
    two = KNNLMForCausalLM(model, [memories[0], memories[2]], [0.2, 0.1])
    assert torch.equal(knn(IDS).logits, two(IDS).logits)
    assert memories[1].asked == []
    knn.lmbda = [0, 0, 0]
    assert torch.equal(knn(IDS).logits, model(IDS).logits.log_softmax(dim=-1))


def test_gradients_reach_model_and_head() -> None:
    model, memories, lmbdas = three()
    KNNLMForCausalLM(model, memories, lmbdas)(IDS, labels=IDS).loss.backward()
    assert model.transformer.h[0].mlp.c_fc.weight.grad.abs().sum() > 0
    assert memories[0].weight.grad.abs().sum() > 0


# --- settings -------------------------------------------------------------------------------


def test_one_memory_keeps_plain_settings_and_several_have_tuples() -> None:
    model, memories, lmbdas = three()
    one = KNNLMForCausalLM(model, memories[0], 0.4)
    assert (one.memory, one.lmbda, one.memories, one.lmbdas) == (
        memories[0],
        0.4,
        (memories[0],),
        (0.4,),
    )
    assert one.capture_point.layer == "ffn"
    listed = KNNLMForCausalLM(model, [memories[0]], [0.4])
    assert (listed.memory, listed.lmbda) == (memories[0], 0.4)
    knn = KNNLMForCausalLM(model, memories, lmbdas)
    assert knn.memory == knn.memories == tuple(memories)
    assert knn.lmbda == knn.lmbdas == (0.2, 0.3, 0.1)
    assert [point.layer for point in knn.capture_points] == ["ffn", "att", "final"]
    assert "lmbda=(0.2, 0.3, 0.1), memory=MultiEmbeddingHead, TinyMemory, TinyMemory" in repr(knn)


def test_shares_can_be_set() -> None:
    model, memories, lmbdas = three()
    knn = KNNLMForCausalLM(model, memories, lmbdas)
    knn.lmbda = (0.1, 0.1, 0.5)
    assert knn.lmbda == (0.1, 0.1, 0.5)
    knn.lmbda = 0.6  # one number is the share of all
    assert knn.lmbda == pytest.approx((0.2, 0.2, 0.2))
    assert KNNLMForCausalLM(model, memories).lmbda == pytest.approx((0.25 / 3,) * 3)
    for bad, message in [
        ([0.1, 0.2], "lmbda has 2 values for 3 memories"),
        ([0.5, 0.3, 0.2], "sum below 1"),
        ([0.5, -0.1, 0.2], "expected 0 <= lmbda < 1"),
        ([0.1, None, 0.2], "expected a number"),
    ]:
        with pytest.raises(SettingError, match=message):
            knn.lmbda = bad
        with pytest.raises(SettingError, match=message):
            KNNLMForCausalLM(model, memories, bad)
    assert knn.lmbda == pytest.approx((0.2, 0.2, 0.2))


def test_memories_can_be_exchanged_for_as_many() -> None:
    model, memories, lmbdas = three()
    knn = KNNLMForCausalLM(model, memories[:2], lmbdas[:2])
    knn.memory = [memories[2], memories[0]]
    assert knn.memories == (memories[2], memories[0])
    assert [point.layer for point in knn.capture_points] == ["final", "ffn"]
    with pytest.raises(KNNLMError, match="3 memories for 2 lmbdas"):
        knn.memory = memories
    with pytest.raises(KNNLMError, match="1 memories for 2 lmbdas"):
        knn.memory = memories[0]
    with pytest.raises(KNNLMError, match="no memory given"):
        knn.memory = []
    assert KNNLMForCausalLM(knn, memories, lmbdas).memories == tuple(memories)


def test_layers_can_be_named_for_each() -> None:
    model, memories, lmbdas = three()
    named = ["transformer.h.1", None, "lm_head:input"]
    knn = KNNLMForCausalLM(model, memories, lmbdas, layer=named)
    assert torch.equal(knn(IDS).logits, KNNLMForCausalLM(model, memories, lmbdas)(IDS).logits)
    with pytest.raises(SettingError, match="layer has 1 values for 3 memories"):
        KNNLMForCausalLM(model, memories, lmbdas, layer=["ffn"])


def test_every_memory_must_fit() -> None:
    model, memories, _ = three()
    narrow = TinyMemory("att", torch.zeros(4, 20), torch.zeros(4, dtype=torch.long), V, 2, 1.0)
    with pytest.raises(KNNLMError, match="20-d states"):
        KNNLMForCausalLM(model, [memories[0], narrow], [0.1, 0.1])
    with pytest.raises(KNNLMError, match="float is no memory"):
        KNNLMForCausalLM(model, [memories[0], 0.2], [0.1, 0.1])


# --- copies ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, lambda knn: pickle.loads(pickle.dumps(knn))]
)
def test_copies(kind: str, copied: Any) -> None:
    model = tiny("gpt2")
    memory = memory_of_kind(kind, model, "gpt2")
    knn = KNNLMForCausalLM(model, memory, 0.6)
    twin = copied(knn)
    assert twin.lmbda == knn.lmbda
    assert type(twin.memory) is type(knn.memory)
    assert torch.equal(twin(IDS).logits, knn(IDS).logits)
    twin.lmbda = 0.1
    assert knn.lmbdas == KNNLMForCausalLM(model, memory, 0.6).lmbdas


# --- explain --------------------------------------------------------------------------------


def test_explain_shows_the_neighbours_of_each_search(tmp_path: Path) -> None:
    model = tiny_gpt2.gpt2()
    stores = [
        Datastore.build(model, tiny_gpt2.corpus(), tmp_path / layer, layer=layer, progress=False)
        for layer in ("att", "ffn")
    ]
    head = head_of(model)
    memories = [KNNMemory(stores[0], k=9), head, KNNMemory(stores[1], k=4)]
    knn = KNNLMForCausalLM(model, memories, [0.3, 0.1, 0.2])
    explained = knn.explain(IDS[:1], top=3)
    shares = np.array([0.3, 0.1, 0.2])
    for t, one in enumerate(explained):
        assert [n.memory for n in one.neighbours] == [0, 0, 0, 2, 2, 2]
        assert isinstance(one.memory_log_prob, tuple)
        mixed = 0.4 * np.exp(one.lm_log_prob) + shares @ np.exp(one.memory_log_prob)
        assert np.log(mixed) == pytest.approx(one.log_prob, abs=1e-4)
        for number in (0, 2):
            alone = KNNLMForCausalLM(model, memories[number]).explain(IDS[:1], top=3)[t].neighbours
            mine = [n for n in one.neighbours if n.memory == number]
            assert [n.entry for n in mine] == [n.entry for n in alone]
            assert [n.weight for n in mine] == pytest.approx([n.weight for n in alone])
    assert sources(explained).row_count == 5
    with pytest.raises(KNNLMError, match=r"MultiEmbeddingHead.* has no neighbours to show"):
        KNNLMForCausalLM(model, head).explain(IDS[:1])


# --- heads follow the wrapper ---------------------------------------------------------------


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
def test_a_head_keeps_its_own_precision(cast: str) -> None:
    """The model is cast; the head computes in float32 from the states of the cast model."""
    model = tiny("llama")
    head = head_of(model)
    before = head.weight.detach().clone()
    knn = KNNLMForCausalLM(model, [head, memory_of(model, "llama", "att")], [0.4, 0.2])
    getattr(knn, cast)()
    assert head.weight.dtype == torch.float32
    assert torch.equal(head.weight, before)
    plain, states = reference.run(model, reference.place(model, "llama", "att"), IDS)
    parts = [
        (states, memory, lmbda) for memory, lmbda in zip(knn.memories, knn.lmbdas, strict=True)
    ]
    logits = knn(IDS).logits
    assert logits.dtype == torch.float32
    truth = reference.mixture_of(plain.logits, parts)
    np.testing.assert_allclose(logits.detach().numpy(), truth, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_head_of_another_precision_answers_in_float32(dtype: torch.dtype) -> None:
    model = tiny("llama")
    head = head_of(model)
    expected = KNNLMForCausalLM(model, head, 0.6)(IDS).logits
    logits = KNNLMForCausalLM(model, head.to(dtype), 0.6)(IDS).logits
    assert logits.dtype == torch.float32
    assert head.weight.dtype == dtype
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.05)


def test_a_head_goes_where_the_wrapper_goes() -> None:
    model = tiny("gpt2")
    head = head_of(model)
    knn = KNNLMForCausalLM(model, [head, memory_of(model, "gpt2", "att")], [0.4, 0.2])
    before = {name: tensor.dtype for name, tensor in head.state_dict().items()}
    knn.to("meta", torch.bfloat16)
    assert {tensor.device.type for tensor in (*head.parameters(), *head.buffers())} == {"meta"}
    assert {name: tensor.dtype for name, tensor in head.state_dict().items()} == before
    assert knn.device.type == "meta"
    knn.to_empty(device="cpu")
    assert {tensor.device.type for tensor in (*head.parameters(), *head.buffers())} == {"cpu"}
    assert {name: tensor.dtype for name, tensor in head.state_dict().items()} == before


def test_a_head_is_brought_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """When it is wrapped and when it is set; never to a model whose weights are not there yet."""
    moves: list[tuple[str, str]] = []
    to = nn.Module.to

    def watched(self: nn.Module, device: Any, *args: Any) -> Any:
        moves.append((type(self).__name__, str(device)))
        return to(self, device, *args)

    model = tiny("gpt2")
    head, other = head_of(model), head_of(model, seed=6)
    monkeypatch.setattr(type(head), "to", watched)
    knn = KNNLMForCausalLM(model, head)
    knn.memory = other
    assert moves == [("MultiEmbeddingHead", "cpu")] * 2
    KNNLMForCausalLM(copy.deepcopy(model).to("meta"), head)
    assert len(moves) == 2
    assert head.weight.device.type == "cpu"


def test_a_head_is_evaluated_and_trained_with_the_wrapper() -> None:
    model, memories, lmbdas = three()
    knn = KNNLMForCausalLM(model, memories, lmbdas)
    assert knn.train().training
    assert memories[0].training
    knn.eval()
    assert not memories[0].training
    assert list(knn.state_dict()) == list(model.state_dict())
    assert {id(p) for p in knn.parameters()} == {id(p) for p in model.parameters()}
