"""What the command line names: a model, a kNN model, a corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from knnlm_hf.errors import CorpusError, KNNLMError, first_line


def load_model(name: str, dtype: str | None, device: str | None) -> tuple[Any, Any]:
    """A plain causal model, or a saved kNN model, with its tokenizer (None where it has none)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    from knnlm_hf import modeling  # noqa: F401 - registers the kNN model type

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise KNNLMError(f"unknown dtype {dtype!r}: choose float32, bfloat16 or float16")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or "auto")
        loaded = loaded.to(device).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise KNNLMError(f"model {name}: {first_line(error)}") from error
    try:
        return loaded, AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        return loaded, None


def load_knn(
    name: str,
    store: str | None,
    dtype: str | None,
    device: str | None,
    lmbda: float | None,
    k: int | None,
    temperature: float | None,
    metric: str,
    index: str,
    rescore: bool,
) -> tuple[Any, Any]:
    """The kNN model of the command line: a saved one, or MODEL with STORE."""
    from knnlm_hf import KNNLMForCausalLM, KNNMemory

    model, tokenizer = load_model(name, dtype, device)
    if store is not None:
        memory = KNNMemory(store, 1024 if k is None else k, temperature, metric, index, rescore)
        model = KNNLMForCausalLM(model, memory, lmbda=0.25 if lmbda is None else lmbda)
    elif not isinstance(model, KNNLMForCausalLM):
        raise KNNLMError(f"{name} is a plain model: name a datastore too, last")
    else:
        if lmbda is not None:
            model.lmbda = lmbda
        if k is not None:
            model.memory.k = k
        if temperature is not None:
            model.memory.temperature = temperature
    return model, tokenizer


def load_corpus(name: str, split: str, lines: bool) -> Any:
    """What the command line calls a corpus: a text file, a data file, a saved or Hub dataset."""
    path = Path(name).expanduser()
    loaders = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    kind = loaders.get(path.suffix)
    if path.is_file() and kind is None:
        if not lines:
            return str(path)
        return (line for line in path.open(encoding="utf-8") if line.strip())
    if not path.exists() and (path.suffix or name.count("/") > 1 or name.startswith((".", "/"))):
        raise CorpusError(f"{name}: no such file")
    import datasets

    try:
        if path.is_file():
            return datasets.load_dataset(kind, data_files=str(path), split="train")
        if path.is_dir():
            loaded = datasets.load_from_disk(str(path))
            return loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        return datasets.load_dataset(name, split=split, streaming=True)
    except (OSError, ValueError, KeyError) as error:
        raise CorpusError(f"corpus {name}: {first_line(error)}") from error
