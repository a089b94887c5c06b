"""The wrapper: any causal language model of transformers, mixed with any memory."""

from knnlm_hf.modeling.config import KNNLMConfig
from knnlm_hf.modeling.explain import Explanation, Neighbour
from knnlm_hf.modeling.wrapper import KNNLMForCausalLM

__all__ = ["Explanation", "KNNLMConfig", "KNNLMForCausalLM", "Neighbour"]
