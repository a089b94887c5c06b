"""transformers' own tests of a model, run on a wrapped one.

`make clients` fetches them: they are in the source distribution of transformers on PyPI, not in its
wheel, and `TRANSFORMERS_TESTS` then says where. Of its generation and export tests the source
distribution has only the imports, so those are not run here; `test_generate.py` has ours.
"""

from __future__ import annotations

import os
import sys
import types
import unittest
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from knnlm_hf.memory import MultiEmbeddingHead
from knnlm_hf.modeling import KNNLMForCausalLM

FOLDER = os.environ.get("TRANSFORMERS_TESTS")
DIFFERENT = {
    "test_base_model_prefix_loads_base_weights": "a folder of the base alone is no kNN model",
    "test_correct_missing_keys": "the same",
    "test_from_pretrained_no_checkpoint": "a kNN model is made from a model, not from weights",
    "test_generation_tester_mixin_inheritance": "asks for the generation tests",
    "test_load_save_without_tied_weights": "the weights lie in base/, or where the base came from",
    "test_model_weights_reload_no_missing_tied_weights": "the same",
    "test_resize_embeddings_untied": "a memory has words that the smaller model has not",
    "test_resize_tokens_embeddings": "a memory has words that the smaller model has not",
}

if FOLDER is None:
    pytest.skip("TRANSFORMERS_TESTS is not set: see `make clients`", allow_module_level=True)


def _upstream(folder: Path) -> Any:
    """The module of common model tests, with empty classes for what was not shipped."""
    package = types.ModuleType("upstream")
    package.__path__ = [str(folder / "tests")]
    sys.modules[package.__name__] = package
    for name, missing in (
        ("generation.test_utils", "GenerationTesterMixin"),
        ("exporters.test_export", "ExportTesterMixin"),
    ):
        parent = types.ModuleType(f"upstream.{name.split('.')[0]}")
        parent.__path__ = []
        module = types.ModuleType(f"upstream.{name}")
        setattr(module, missing, type(missing, (), {}))
        sys.modules |= {parent.__name__: parent, module.__name__: module}
    return import_module("upstream.test_modeling_common")


def _wrapped(base: type[Any]) -> type[Any]:
    """A class that is made from a config as a model class is, and gives a wrapped model."""

    def make(cls: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        if args:  # as `from_pretrained` calls it
            return KNNLMForCausalLM(config, *args, **kwargs)
        torch.manual_seed(0)
        head = MultiEmbeddingHead(config.hidden_size, config.vocab_size, n=2)
        return KNNLMForCausalLM(base(config), head, 0.5)

    members = {
        "__new__": make,
        "__init__": lambda self, *args, **kwargs: None,
        "__module__": base.__module__,
    }
    return type(base.__name__, (type(make(None, Tester.config())),), members)


class Tester:
    """What the common tests ask of a model's tester."""

    batch_size, seq_length, is_training = 3, 7, True
    num_hidden_layers, hidden_size, num_attention_heads = 2, 32, 4

    @staticmethod
    def config() -> LlamaConfig:
        return LlamaConfig(
            vocab_size=99, hidden_size=32, intermediate_size=37, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
            eos_token_id=2,
        )  # fmt: skip

    get_config = config

    def prepare_config_and_inputs_for_common(self) -> tuple[LlamaConfig, dict[str, Any]]:
        ids = common.ids_tensor([self.batch_size, self.seq_length], 99)
        return self.config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


common = _upstream(Path(FOLDER))


class TestWrappedLlama(common.ModelTesterMixin, unittest.TestCase):  # type: ignore[misc]
    """Everything that transformers asks of any model of its own."""

    all_model_classes = (_wrapped(LlamaForCausalLM),)

    def setUp(self) -> None:
        self.model_tester = Tester()
        if self._testMethodName in DIFFERENT:
            self.skipTest(DIFFERENT[self._testMethodName])
