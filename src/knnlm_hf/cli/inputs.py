"""What the command line names: a model, a kNN model, a corpus."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from knnlm_hf.cli.groups import Loading, Memories, Mixture
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


def load_knn(name: str, loading: Loading, memories: Memories, mixture: Mixture) -> tuple[Any, Any]:
    """The kNN model of the command line, and its tokenizer: a saved one, or MODEL with memories."""
    from knnlm_hf import KNNLMForCausalLM

    model, tokenizer = load_model(name, loading.model_dtype, loading.device)
    lmbda: Any = mixture.lmbda or None
    if lmbda is not None and len(lmbda) == 1:
        (lmbda,) = lmbda
    if memories.sources or (memories.cache is not None and not hasattr(model, "memories")):
        opened = [_memory(source, memories, mixture) for source in memories.sources]
        if memories.cache is not None:
            opened.append(_cache(model, opened, memories, mixture))
        _check_used(opened, memories, mixture)
        return KNNLMForCausalLM(model, opened, lmbda=0.25 if lmbda is None else lmbda), tokenizer
    if not isinstance(model, KNNLMForCausalLM):
        raise KNNLMError(f"{name} is a plain model: name a datastore or a head too, last")
    if memories.cache is not None:
        raise KNNLMError(
            f"{name} is a kNN model with memories of its own: name its model and its datastore to "
            "put --cache beside them"
        )
    unused = memories.search.keys() - {"k"}
    if unused:
        raise KNNLMError(
            f"{name} is a kNN model, whose memory has its own {', '.join(sorted(unused))}: name a "
            "datastore too, last, to search it otherwise"
        )
    if lmbda is not None:
        model.lmbda = lmbda
    _check_used(model.memories, memories, mixture)
    for memory in filter(_searches, model.memories):
        memory.k = memory.k if memories.k is None else memories.k
        for setting, value in mixture.fitted.items():
            if hasattr(memory, setting):
                setattr(memory, setting, value)
    return model, tokenizer


def _memory(source: str, memories: Memories, mixture: Mixture) -> Any:
    from knnlm_hf import HybridMemory, KNNMemory
    from knnlm_hf.memory import Head, open_source

    opened = open_source(source)
    if isinstance(opened, Head):
        return opened
    settings = memories.search | mixture.fitted
    if memories.match_length is not None:
        return HybridMemory(opened, **settings)
    settings.pop("match_weight", None)
    return KNNMemory(opened, **settings)


def _cache(model: Any, opened: list[Any], memories: Memories, mixture: Mixture) -> Any:
    """A memory of the text itself, of the first memory's layer where the whole text has that."""
    from knnlm_hf import CacheMemory

    given = {"k": memories.k, "metric": memories.metric, "temperature": mixture.temperature}
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    settings["size"] = memories.cache
    for memory in opened:
        if memory.layer != "final":
            width, layer = memory.hidden_size, memory.layer
            return CacheMemory(width, memory.vocab_size, layer=layer, **settings)
    return CacheMemory.of(model, **settings)


def _searches(memory: Any) -> bool:
    return hasattr(memory, "search")


def _check_used(opened: Iterable[Any], memories: Memories, mixture: Mixture) -> None:
    """Refuse options of a search where no memory searches so."""
    given = memories.search | mixture.fitted
    searching = list(filter(_searches, opened))
    unused = [name for name in given if not any(hasattr(memory, name) for memory in searching)]
    if unused:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        if unused == ["match_weight"]:
            raise KNNLMError(
                f"{options}: only for a datastore that is searched with --match-length"
            )
        raise KNNLMError(f"{options}: only for a datastore, and none of the memories is one")


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
