"""What does each retrieval-free memory keep of kNN-LM's gain, and what does it cost?

    python benchmarks/heads.py train MODEL STORE HEADS n1 mlp-distilled     # by name, see `RECIPES`
    python benchmarks/heads.py evaluate MODEL STORE HEADS --valid valid.txt --test test.txt
    python benchmarks/heads.py speed MODEL STORE HEADS --valid valid.txt

`train` keeps each head under HEADS/<name>, with its seconds; one that is there is left alone.
`evaluate` scores model, datastore and all heads found in one pass over each split, fits λ (and the
datastore's k and t) on valid and reports test: gain = drop in log-perplexity against the model.
`speed` times generate() at batch 1, from prompts of valid, and scoring, in turn with the model
alone. Results go to HEADS/results.json.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import generating, machine, paired, prompts_of, quantiles, ratios, tokens_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from knnlm_hf import (
    CentroidMemory,
    Datastore,
    KNNLMForCausalLM,
    KNNMemory,
    MixtureOfSoftmaxes,
    MLPMemory,
    MultiEmbeddingHead,
    SoftTargets,
    score,
)
from knnlm_hf.memory.checkpoint import remove_checkpoint
from knnlm_hf.memory.head import Head
from knnlm_hf.tuning import fit

FIXED: dict[str, Any] = {"dtype": "bfloat16"}
RECIPES: dict[str, tuple[Any, dict[str, Any]]] = {
    **{f"n{n}": (MultiEmbeddingHead, {"n": n}) for n in range(1, 10)},
    **{f"n{n}-start": (MultiEmbeddingHead, {"n": n, "start": True}) for n in range(1, 10)},
    "n1-distilled": (MultiEmbeddingHead, {"n": 1, "start": True, "teacher": True}),
    "mos3": (MixtureOfSoftmaxes, {"components": 3}),
    "centroids": (CentroidMemory, {}),
    "mlp": (MLPMemory, {"layers": 3, "budget": 4, "start": True}),
    "mlp-distilled": (MLPMemory, {"layers": 3, "budget": 4, "start": True, "teacher": True}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", choices=["train", "evaluate", "speed"])
    parser.add_argument("model")
    parser.add_argument("store")
    parser.add_argument("heads", type=Path)
    parser.add_argument("names", nargs="*", help="of RECIPES, to train")
    parser.add_argument("--valid")
    parser.add_argument("--test")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--negatives", type=int)
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--teacher", help="folder of soft targets; default: retrieved anew")
    parser.add_argument("--suffix", default="", help="of the names that are written")
    parser.add_argument("--no-knn", action="store_true", help="leave the datastore out")
    parser.add_argument("--windows", type=int, default=8, help="scored at a time")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    if options.job != "train" and not options.valid:
        parser.error(f"{options.job} needs --valid, a text file")
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    {"train": train, "evaluate": evaluate, "speed": speed}[options.job](options, model)


def train(options: argparse.Namespace, model: Any) -> None:
    store = Datastore.open(options.store)
    for name in options.names:
        folder = options.heads / (name + options.suffix)
        if (folder / "seconds.json").exists():
            print(f"{folder} is there")
            continue
        kind, settings = RECIPES[name]
        settings = {**FIXED, "epochs": options.epochs, **settings}
        settings |= {k: v for k in ("lr", "negatives") if (v := getattr(options, k)) is not None}
        if settings.pop("start", False):
            settings["start"] = model
        if settings.pop("teacher", False):
            settings["teacher"] = (
                SoftTargets.open(options.teacher) if options.teacher else KNNMemory(store)
            )
            settings["alpha"] = options.alpha
        begun = time.perf_counter()
        head = kind.train_on(store, checkpoint=folder / "checkpoint", progress=False, **settings)
        seconds = time.perf_counter() - begun
        head.save_pretrained(folder)
        remove_checkpoint(folder / "checkpoint")
        (folder / "seconds.json").write_text(json.dumps({"seconds": seconds} | machine()))
        print(name, f"{seconds:.0f} s", head.trained, flush=True)


def found_heads(options: argparse.Namespace) -> dict[str, Any]:
    folders = sorted(path.parent for path in options.heads.glob("*/seconds.json"))
    return {folder.name: Head.from_pretrained(folder) for folder in folders}


def evaluate(options: argparse.Namespace, model: Any) -> None:
    heads = found_heads(options)
    memories = ({} if options.no_knn else {"knn": KNNMemory(options.store)}) | heads
    knn = KNNLMForCausalLM(
        model, list(memories.values()), lmbda=[0.5 / len(memories)] * len(memories)
    )
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    table: dict[str, Any] = {"settings": {"valid": options.valid, "test": options.test}, "rows": {}}
    texts = {"valid": options.valid, "test": options.test}
    scored = {
        split: score(knn, text, tokenizer=tokenizer, batch_size=options.windows)
        for split, text in texts.items()
    }
    for i, (name, memory) in enumerate(memories.items()):
        valid, test = (
            replace(scores, memories=scores.memories[i : i + 1], lmbdas=(0.1,))
            for scores in scored.values()
        )
        best = fit(valid)
        setting = {"lmbda": best.lmbda, "temperature": best.temperature, "k": best.k}
        mixed = test.perplexity(**setting)
        row = setting | {
            "alone": test.memory_perplexity(best.temperature, best.k),
            "mixed": mixed,
            "gain": math.log(test.base_perplexity / mixed),
            "oracle": test.oracle(best.temperature, best.k),
        }
        if name in heads:
            row["parameters"] = sum(p.numel() for p in memory.parameters())
            row["bytes"] = sum(t.nbytes for t in memory.state_dict().values())
            row |= json.loads((options.heads / name / "seconds.json").read_text())
            row["trained"] = memory.trained.to_dict()
        table["rows"][name] = row
    table["base"] = {split: scores.base_perplexity for split, scores in scored.items()}
    reference = table["rows"].get("knn", {}).get("gain")
    for name, row in table["rows"].items():
        row["share"] = row["gain"] / reference if reference else None
        print(name, {k: v for k, v in row.items() if k != "trained"})
    keep(options, "quality", table)


def speed(options: argparse.Namespace, model: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    prompts = prompts_of(tokens_of(options.valid, tokenizer, 20_001))
    windows = torch.randint(1, model.config.vocab_size, (8, 128))
    rows: dict[str, dict[str, Any]] = {}
    for name, head in found_heads(options).items():
        knn = KNNLMForCausalLM(model, head)

        @torch.no_grad()
        def forward(which: Any) -> int:
            which(windows)
            return windows.numel()

        rows[name] = {}
        both = {"model": model, "mixture": knn}
        jobs: dict[str, Callable[[Any], Callable[[], int]]] = {
            "generate": partial(generating, prompts=prompts, do_sample=False),
            "generate, sampled": partial(generating, prompts=prompts, do_sample=True),
            "forward": lambda of: partial(forward, of),
        }
        for job, work in jobs.items():
            rates = paired({which: work(of) for which, of in both.items()}, 10)
            rows[name][job] = ratios(rates, "model")["mixture"] | {
                "model_tokens_per_second": quantiles(rates["model"])["p50"]
            }
        print(name, rows[name], flush=True)
    keep(options, "speed", {"rows": rows} | machine())


def keep(options: argparse.Namespace, part: str, values: Any) -> None:
    path = options.heads / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(results | {part: values}, indent=2) + "\n")


if __name__ == "__main__":
    main()
