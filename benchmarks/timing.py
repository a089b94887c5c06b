"""Paired timings: two or more things in turn, so that a noisy machine treats them alike."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import faiss
import torch
import transformers


def paired(work: dict[str, Callable[[], int]], runs: int) -> dict[str, list[float]]:
    """Units per second of each callable (it returns its units), run in turn, one warm-up each."""
    rates: dict[str, list[float]] = {name: [] for name in work}
    for run in range(runs + 1):
        for name, function in work.items():
            begun = time.perf_counter()
            units = function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if run:
                rates[name].append(units / (time.perf_counter() - begun))
    return rates


def quantiles(values: list[float]) -> dict[str, float]:
    """p20, p50 and p80."""
    ordered = torch.tensor(values, dtype=torch.float64)
    return {f"p{q}": float(ordered.quantile(q / 100)) for q in (20, 50, 80)}


def ratios(rates: dict[str, list[float]], reference: str) -> dict[str, dict[str, float]]:
    """Quantiles of each rate over the reference's of the same turn."""
    base = rates[reference]
    return {
        name: quantiles([a / b for a, b in zip(values, base, strict=True)])
        for name, values in rates.items()
    }


def generating(of: Any, prompts: list[torch.Tensor], *, do_sample: bool) -> Callable[[], int]:
    """Work for `paired`: 128 new tokens after the next of the prompts, over and over."""
    turns = cycle(prompts)

    def work() -> int:
        prompt = next(turns)
        tokens = of.generate(
            prompt, max_new_tokens=128, min_new_tokens=128, do_sample=do_sample, pad_token_id=0
        )
        return int(tokens.shape[1] - prompt.shape[1])

    return work


def tokens_of(path: str, tokenizer: Any, limit: int) -> list[int]:
    """The first `limit` tokens of a text file."""
    text = Path(path).read_text(encoding="utf-8")[: limit * 8]
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids[:limit]


def prompts_of(ids: list[int], count: int = 5, length: int = 64) -> list[torch.Tensor]:
    """`count` prompts (1, length) from places spread over a text."""
    step = (len(ids) - length) // count
    return [torch.tensor([ids[i * step : i * step + length]]) for i in range(count)]


def machine() -> dict[str, Any]:
    """What was measured on."""
    has_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if has_gpu else _cpu(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "faiss": faiss.__version__,
    }


def _cpu() -> str:
    """Its name, and the family and model by which those of one name differ."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            fields = dict(line.split(":", 1) for line in lines if ":" in line)
    except OSError:
        return platform.processor()
    named = {key.strip(): value.strip() for key, value in fields.items()}
    name = named.get("model name", platform.processor())
    return f"{name}, family {named.get('cpu family', '?')}, model {named.get('model', '?')}"
