"""Train (or take) a model, build a datastore of another domain, tune, evaluate, generate."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from knnlm_hf.build import Datastore
from knnlm_hf.demo.texts import docstrings, reference, split
from knnlm_hf.demo.train import train_model, train_tokenizer
from knnlm_hf.errors import CorpusError
from knnlm_hf.memory import KNNMemory
from knnlm_hf.modeling import KNNLMForCausalLM
from knnlm_hf.scoring import perplexity
from knnlm_hf.sources import sources
from knnlm_hf.tuning import tune
from knnlm_hf.windows import default_window

_PROMPT_TOKENS, _NEW_TOKENS = 24, 24  # less where the model's context is shorter


def run(
    out: str | Path = ".demo",
    *,
    model: str | None = None,
    corpus: str | None = None,
    steps: int = 300,
    quiet: bool = False,
) -> dict[str, Any]:
    """Show what a datastore does to a model on a domain that the model was not trained for.

    Args:
        out: folder for the datastore; its `store` subfolder is made anew each time.
        model: folder or Hub id of a causal model; None: a small GPT-2 is trained on the
            docstrings of Python's standard library.
        corpus: path of a text file of your domain; None: Python's language reference.
        steps: training steps of the small GPT-2.
        quiet: print nothing.

    Returns:
        The figures that were printed: base and mixture perplexity on held-out text, settings, the
        generated text, seconds.
    """
    console = Console(quiet=quiet)
    begun = time.perf_counter()
    train, valid, test = split(_blocks(corpus) if corpus else reference())
    domain = corpus or "Python's language reference"
    lm, tokenizer = _model(model, steps, console)

    console.print(f"[bold]2. Datastore[/] of {domain}: {len(train)} texts, one pass, no training")
    folder = Path(out) / "store"
    shutil.rmtree(folder, ignore_errors=True)
    store = Datastore.build(lm, train, folder, tokenizer=tokenizer, progress=not quiet)
    store.build_index("auto", progress=not quiet)
    console.print(f"   {len(store):,} entries of {store.dim} dimensions in {folder}")

    knn: Any = KNNLMForCausalLM(lm, KNNMemory(store))
    best = tune(knn, valid, tokenizer=tokenizer, progress=not quiet)
    console.print(f"[bold]3. Tuned[/] on {len(valid)} held-out texts: {best.message}")

    report = perplexity(knn, test, tokenizer=tokenizer, progress=not quiet)
    ratio = report.perplexity / report.base_perplexity
    console.print(f"[bold]4. Perplexity[/] on {len(test)} other texts, {report.tokens:,} tokens:")
    console.print(f"   model alone {report.base_perplexity:8.2f}")
    console.print(f"   kNN-LM      {report.perplexity:8.2f}   ({ratio:.2f} of it)")

    third = default_window(lm.config) // 3
    passage = tokenizer(_passage(test), return_tensors="pt")["input_ids"]
    prompt = passage[:, : min(third, _PROMPT_TOKENS)]
    start = prompt.shape[1]
    output = knn.generate(
        prompt.to(knn.device), max_new_tokens=min(third, _NEW_TOKENS), do_sample=False,
        no_repeat_ngram_size=4, pad_token_id=tokenizer.eos_token_id,
    )[0]  # fmt: skip
    text = tokenizer.decode(output[start:])
    console.print("[bold]5. Generation[/]")
    console.print(f"   {tokenizer.decode(prompt[0])!r} →\n   {text!r}", markup=False)
    found = knn.explain(output, top=64, tokenizer=tokenizer)[start - 1 : -1]
    console.print("[bold]6. Where its tokens came from[/]")
    console.print(sources(found[:10], top=1))
    seconds = time.perf_counter() - begun
    console.print(f"{seconds:.0f} seconds in all")
    return {
        "base_perplexity": report.base_perplexity, "perplexity": report.perplexity,
        "ratio": ratio, "lmbda": best.lmbda, "temperature": best.temperature, "k": best.k,
        "entries": len(store), "text": text, "seconds": seconds,
    }  # fmt: skip


def _model(name: str | None, steps: int, console: Console) -> tuple[Any, Any]:
    if name is None:
        console.print("[bold]1. A small GPT-2[/], trained on the standard library's docstrings")
        texts = docstrings()
        tokenizer = train_tokenizer(texts)
        return train_model(texts, tokenizer, steps=steps), tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    console.print(f"[bold]1. Loading {name}[/]")
    model: Any = AutoModelForCausalLM.from_pretrained(name)
    return model.eval(), AutoTokenizer.from_pretrained(name)


def _passage(texts: list[str]) -> str:
    """The first paragraph of prose, or the first text where there is none."""
    paragraphs = (part for text in texts for part in text.split("\n\n"))
    return next((p for p in paragraphs if len(p) > 300 and p[0].isupper()), texts[0])


def _blocks(path: str, blocks: int = 100) -> list[str]:
    """A text file cut at line ends into `blocks` parts of about equal length."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path}: not a readable UTF-8 text file ({error})") from error
    if len(lines) < 30:
        raise CorpusError(f"{path} has {len(lines)} lines, expected 30 or more to split it")
    size = -(-len(lines) // blocks)
    return ["".join(lines[i : i + size]) for i in range(0, len(lines), size)]
