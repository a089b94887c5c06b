"""Quantised weights: wrapped as the same model, mixed as exactly as the base allows.

Needs torchao, bitsandbytes or both; `make clients` has them. bitsandbytes packs 4-bit weights in
blocks of 64: on the CPU a model has to be that wide.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
)

from knnlm_hf.build import Datastore
from knnlm_hf.memory import KNNMemory
from knnlm_hf.modeling import KNNLMForCausalLM

IDS = torch.tensor([[3, 9, 27, 17, 51]])
VOCABULARY = 64


def torchao_int8() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def bitsandbytes_int8() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_8bit=True)


def bitsandbytes_nf4() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )


def base_in(folder: Path) -> Any:
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=128,
        )
    ).eval()  # fmt: skip
    base.save_pretrained(folder)
    return base


@pytest.mark.parametrize(
    ("package", "config", "weights", "closeness"),
    [
        ("torchao", torchao_int8, "torchao", 0.2),
        ("bitsandbytes", bitsandbytes_int8, "bitsandbytes", 0.2),
        ("bitsandbytes", bitsandbytes_nf4, "bitsandbytes", 1.0),
    ],
)
def test_quantised_weights(
    package: str, config: Any, weights: str, closeness: float, tmp_path: Path
) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"no {package}")
    base = base_in(tmp_path / "base")
    corpus = [[token % VOCABULARY for token in row] for row in tiny.corpus(20)]
    store = Datastore.build(base, corpus, tmp_path / "store", progress=False)
    small = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32, device_map="cpu", quantization_config=config()
    ).eval()
    projection = small.model.layers[0].self_attn.q_proj
    assert any(
        type(part).__module__.startswith(weights) for part in (projection, projection.weight)
    )
    memory = KNNMemory(store, k=8)
    knn = KNNLMForCausalLM(small, memory, 0.5)
    states: list[torch.Tensor] = []
    with torch.no_grad():
        hook = small.model.layers[-1].mlp.register_forward_pre_hook(
            lambda _, args: states.append(args[0])
        )
        alone = small(IDS).logits.float().log_softmax(-1)
        hook.remove()
        mixed = torch.logaddexp(alone, memory.log_probs(states[0])) + math.log(0.5)
        torch.testing.assert_close(knn(IDS).logits, mixed, atol=1e-4, rtol=1e-4)
        shift = (alone - base(IDS).logits.log_softmax(-1)).abs().max()
        assert 0 < float(shift) < closeness
        assert not torch.allclose(mixed, alone, atol=0.05)
    made = knn.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert made.shape == (1, 9)
    again = Datastore.build(small, corpus, tmp_path / "again", progress=False)
    KNNLMForCausalLM(base, KNNMemory(again, k=8), 0.5)  # the same model's states, nearly
    assert (again.keys[:].float() - store.keys[:].float()).abs().max() < closeness
