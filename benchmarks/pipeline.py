"""The whole pipeline against the model alone: build, evaluate, tune, generate, quality.

    python benchmarks/pipeline.py MODEL --train TEXT --valid TEXT --test TEXT --store FOLDER

Every figure is a rate, and a ratio to its reference taken in turn with it in the same run. The
store is built where it does not exist yet, and used where it does.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from timing import generating, machine, paired, prompts_of, quantiles, ratios, tokens_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from knnlm_hf import (
    CacheMemory,
    Datastore,
    HybridMemory,
    KNNLMForCausalLM,
    KNNMemory,
    perplexity,
    score,
    tune,
)
from knnlm_hf.corpus import documents
from knnlm_hf.modeling import mixture
from knnlm_hf.modeling.skipping import is_settled
from knnlm_hf.tuning import fit
from knnlm_hf.windows import batches

SECTIONS = ("build", "memory", "evaluate", "tune", "generate", "quality")


def bench_build(args: argparse.Namespace, model: Any, ids: list[int]) -> dict[str, Any]:
    """Build against the same windows through the whole model with loss, in float32."""
    ids = ids[: args.build_tokens]
    window = model.config.max_position_embeddings
    scratch = Path(tempfile.mkdtemp(dir=args.scratch))

    def forward() -> int:
        stream = batches(documents([ids]), window, window, 8)
        with torch.no_grad():
            for batch in stream:
                model(input_ids=batch.input_ids, labels=batch.input_ids)
        return len(ids)

    def build(of: Any) -> int:
        shutil.rmtree(scratch / "store", ignore_errors=True)
        Datastore.build(of, [ids], scratch / "store", window=window, stride=window, progress=False)
        return len(ids)

    work = {"forward with loss, float32": forward, "build, float32": lambda: build(model)}
    if has_bfloat16():
        half = copy.deepcopy(model).to(torch.bfloat16)
        work["build, bfloat16"] = lambda: build(half)
    rates = paired(work, args.runs)
    shutil.rmtree(scratch)
    return _section(rates, "forward with loss, float32", tokens=len(ids))


def has_bfloat16() -> bool:
    """Whether the device multiplies in bfloat16; a CPU that does not is many times slower in it."""
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.cuda.is_available() or supported


def wrapped(args: argparse.Namespace, model: Any, store: Any) -> dict[str, Any]:
    """kNN-LM, with the text itself as a second memory, and that one alone."""
    memory, text = KNNMemory(store, k=args.k), CacheMemory.of(model)
    hybrid = HybridMemory(store, k=args.k)
    mixtures = {
        "mixture": [memory], "mixture and cache": [memory, text], "cache": [text],
        "hybrid": [hybrid], "hybrid and cache": [hybrid, text],
    }  # fmt: skip
    return {name: KNNLMForCausalLM(model, memories) for name, memories in mixtures.items()}


def bench_memory(args: argparse.Namespace) -> dict[str, Any]:
    """Peak resident memory of a build, for one, two and eight times the corpus."""
    peaks = {}
    for times in (1, 2, 8):
        with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
            command = [sys.executable, __file__, args.model, "--train", args.train]
            command += ["--store", f"{folder}/store", "--peak-of", str(times * 50_000)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks[f"{times * 50_000} tokens"] = int(done.stdout)
    return {"peak_mb": peaks}


def peak_of(args: argparse.Namespace, model: Any, ids: list[int]) -> int:
    """Build a store of `args.peak_of` tokens and return this process's peak memory in MB."""
    Datastore.build(model, [ids[: args.peak_of]], args.store, progress=False)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def bench_evaluate(args: argparse.Namespace, model: Any, store: Any, ids: list[int]) -> Any:
    """Scoring with k neighbours against scoring with the model alone, and against exact search."""
    ids = ids[: args.eval_tokens]
    models = {"model alone": model, **wrapped(args, model, store)}
    knn = models["mixture"]
    best = tune(knn, [ids], progress=False)
    options: dict[str, Any] = {"progress": False}

    def scoring(of: Any) -> Any:
        return lambda: perplexity(of, [ids], **options).tokens

    rates = paired({name: scoring(of) for name, of in models.items()}, args.runs)
    found = perplexity(knn, [ids], **options)
    exact_ids = ids[: args.exact_tokens]
    exact = KNNLMForCausalLM(model, KNNMemory(store, args.k, best.temperature, index="exact"))
    here, there = (fit(score(m, [exact_ids], **options)).perplexity for m in (knn, exact))
    return {
        **_section(rates, "model alone", tokens=found.tokens),
        "perplexity": found.perplexity,
        "base_perplexity": found.base_perplexity,
        "sample_of_exact": len(exact_ids),
        "perplexity_over_exact": here / there,
        "model_seconds": found.model_seconds,
        "memory_seconds": found.memory_seconds,
    }


def bench_tune(args: argparse.Namespace, model: Any, store: Any, ids: list[int]) -> dict[str, Any]:
    """A grid of 30 temperatures × 20 λ × 5 k on kept scores, against the pass that made them."""
    knn = KNNLMForCausalLM(model, KNNMemory(store, k=args.k))
    begun = time.perf_counter()
    scores = score(knn, [ids[:20_000]], progress=False)
    retrieval = time.perf_counter() - begun
    grid = {
        "temperatures": [scores.temperature * 2 ** (i / 3) for i in range(-15, 15)],
        "lmbdas": [i / 20 for i in range(20)],
        "ks": [max(1, args.k >> shift) for shift in (0, 1, 2, 4, 6)],
    }
    seconds = []
    for _ in range(args.runs + 1):
        begun = time.perf_counter()
        fit(scores, **grid)
        seconds.append(time.perf_counter() - begun)
    return {
        "tokens": len(scores),
        "retrieval_seconds": retrieval,
        "search_seconds": scores.memory_seconds,
        "grid_seconds": quantiles(seconds[1:]),
        "share_of_retrieval": quantiles([s / retrieval for s in seconds[1:]]),
    }


def bench_generate(args: argparse.Namespace, model: Any, store: Any, ids: list[int]) -> Any:
    """128 new tokens at batch 1: greedy, and sampled, where every step searches."""
    models = {"model alone": model, **wrapped(args, model, store)}
    prompts = [prompt.to(model.device) for prompt in prompts_of(ids)]

    def section(names: Iterable[str], *, do_sample: bool) -> dict[str, Any]:
        work = {name: generating(models[name], prompts, do_sample=do_sample) for name in names}
        return _section(paired(work, args.runs * 3), "model alone")

    return {
        **section(models, do_sample=False),
        "steps_without_search": share_without_search(models["mixture"], prompts),
        "sampled": section(["model alone", "mixture"], do_sample=True),
    }


def share_without_search(knn: Any, prompts: list[Any]) -> float:
    """Of the greedy steps, those whose token no memory could change."""
    settled = []

    def watched(*args: Any) -> bool:
        settled.append(is_settled(*args))
        return settled[-1]

    generate = generating(knn, prompts, do_sample=False)
    with patch.object(mixture, "is_settled", watched):
        steps = sum(generate() for _ in prompts)
    return sum(settled) / steps


def bench_quality(args: argparse.Namespace, model: Any, store: Any, tokenizer: Any) -> Any:
    """Tuned on valid, reported on test: each mixture."""
    return {
        name: _quality(args, knn, tokenizer) for name, knn in wrapped(args, model, store).items()
    }


def _quality(args: argparse.Namespace, knn: Any, tokenizer: Any) -> dict[str, Any]:
    best = tune(knn, args.valid, tokenizer=tokenizer, progress=False)
    report = perplexity(knn, args.test, tokenizer=tokenizer, progress=False)
    return {
        "lmbda": best.lmbda, "temperature": best.temperature, "k": best.k,
        "match_weight": best.match_weight,
        "tokens": report.tokens, "base_perplexity": report.base_perplexity,
        "perplexity": report.perplexity, "ratio": report.perplexity / report.base_perplexity,
        "oracle_perplexity": report.oracle_perplexity,
        "word_perplexity": report.word_perplexity,
        "base_word_perplexity": report.base_word_perplexity,
    }  # fmt: skip


def _section(rates: dict[str, list[float]], reference: str, **facts: Any) -> dict[str, Any]:
    per_second = {name: quantiles(values) for name, values in rates.items()}
    return {**facts, "tokens_per_second": per_second, "ratio": ratios(rates, reference)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--train", required=True)
    parser.add_argument("--valid")
    parser.add_argument("--test")
    parser.add_argument("--store", required=True)
    parser.add_argument(
        "--only", nargs="*", default=["build", "memory", "evaluate", "tune", "generate", "quality"]
    )
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--build-tokens", type=int, default=200_000)
    parser.add_argument("--eval-tokens", type=int, default=10_000)
    parser.add_argument("--exact-tokens", type=int, default=10_240)
    parser.add_argument("--scratch", default=tempfile.gettempdir())
    parser.add_argument("--json", type=Path, help="add the figures to this file")
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(args.model).eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    if args.peak_of:
        print(peak_of(args, model, tokens_of(args.train, tokenizer, args.peak_of)))
        return
    results: dict[str, Any] = {"machine": machine(), "model": Path(args.model).name, "k": args.k}
    if "build" in args.only:
        train = tokens_of(args.train, tokenizer, args.build_tokens)
        results["build"] = bench_build(args, model, train)
    if "memory" in args.only:
        results["memory"] = bench_memory(args)
    if {"evaluate", "tune", "generate", "quality"} & set(args.only):
        begun = time.perf_counter()
        store = Datastore.build(model, args.train, args.store, tokenizer=tokenizer)
        if not (store.path / "indexes").exists():
            store.build_index("auto")
        results["store"] = {"entries": len(store), "seconds": time.perf_counter() - begun}
        held_out = tokens_of(args.valid, tokenizer, max(20_001, args.eval_tokens))
        for name, bench in (
            ("evaluate", bench_evaluate),
            ("tune", bench_tune),
            ("generate", bench_generate),
        ):
            if name in args.only:
                results[name] = bench(args, model, store, held_out)
        if "quality" in args.only:
            results["quality"] = bench_quality(args, model, store, tokenizer)
    show(results)
    if args.json:
        kept = json.loads(args.json.read_text()) if args.json.exists() else {}
        args.json.write_text(json.dumps({**kept, **results}, indent=2) + "\n")


def show(results: dict[str, Any]) -> None:
    """Print every figure, a row each."""
    table = Table("", "figure")

    def rows(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and set(value) == {"p20", "p50", "p80"}:
            table.add_row(prefix, " / ".join(f"{value[q]:,.4g}" for q in ("p20", "p50", "p80")))
        elif isinstance(value, dict):
            for name, inner in value.items():
                rows(f"{prefix} · {name}" if prefix else name, inner)
        else:
            table.add_row(prefix, f"{value:,.5g}" if isinstance(value, float) else str(value))

    rows("", results)
    Console().print(table)


if __name__ == "__main__":
    main()
