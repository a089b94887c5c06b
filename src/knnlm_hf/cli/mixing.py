"""`knnlm tune`, `eval` and `generate`: a model with its memories."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from knnlm_hf.cli.groups import Loading, Memories, Mixture, Reading, grouped
from knnlm_hf.cli.inputs import load_corpus, load_knn
from knnlm_hf.cli.options import Corpus, Json, Model
from knnlm_hf.cli.outputs import number, show
from knnlm_hf.errors import KNNLMError

app = typer.Typer()


@app.command()
@grouped
def tune(
    model: Model,
    corpus: Corpus,
    memories: Memories,
    out: Annotated[Path | None, typer.Option(help="Save the tuned kNN model here.")] = None,
    reading: Reading = Reading(split="validation"),  # noqa: B008 - frozen
    loading: Loading = Loading(),  # noqa: B008
    as_json: Json = False,
) -> None:
    """Fit k, temperature and lambda, of several memories together, to held-out text."""
    from knnlm_hf import tune as fit

    knn, tokenizer = load_knn(model, loading, memories, Mixture())
    text = load_corpus(corpus, reading.split, reading.lines)
    best = fit(knn, text, tokenizer=tokenizer, **reading.windows)
    if out is not None:
        knn.save_pretrained(out, tokenizer=tokenizer)
    show({**asdict(best), "helps": best.helps}, as_json)


@app.command("eval")
@grouped
def evaluate(
    model: Model,
    corpus: Corpus,
    memories: Memories,
    mixture: Mixture,
    reading: Reading = Reading(),  # noqa: B008
    loading: Loading = Loading(),  # noqa: B008
    as_json: Json = False,
) -> None:
    """Perplexity of the model, each memory and their mixture, side by side."""
    from knnlm_hf import perplexity

    knn, tokenizer = load_knn(model, loading, memories, mixture)
    text = load_corpus(corpus, reading.split, reading.lines)
    report = perplexity(knn, text, tokenizer=tokenizer, **reading.windows)
    if as_json:
        return show({**asdict(report), "lmbda": knn.lmbda}, as_json)
    table = Table("", "perplexity", "per word", title=f"{corpus}: {report.tokens:,} tokens")
    word = report.word_perplexity, report.base_word_perplexity
    table.add_row("model alone", number(report.base_perplexity), number(word[1]))
    found = report.memory_perplexity
    for alone, memory in zip(
        found if isinstance(found, tuple) else [found], knn.memories, strict=True
    ):
        name = "memory" if len(knn.memories) == 1 else type(memory).__name__
        table.add_row(f"{name} alone", number(alone), "")
    shares = ", ".join(f"{lmbda:.3g}" for lmbda in knn.lmbdas)
    table.add_row(f"mixture (lambda {shares})", number(report.perplexity), number(word[0]))
    table.add_row("best of these per token", number(report.oracle_perplexity), "")
    Console().print(table, f"{report.tokens_per_second:,.0f} tokens/s")
    return None


@app.command()
@grouped
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    memories: Memories,
    mixture: Mixture,
    explain: Annotated[bool, typer.Option("--explain", help="Sources of each token.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 40,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of greedy.")] = False,
    seed: Annotated[int, typer.Option()] = 0,
    loading: Loading = Loading(),  # noqa: B008
    as_json: Json = False,
) -> None:
    """Continue PROMPT; with --explain, say where each token came from."""
    import torch

    from knnlm_hf.sources import sources

    knn, tokenizer = load_knn(model, loading, memories, mixture)
    if tokenizer is None:
        raise KNNLMError(f"{model} has no tokenizer: save one beside the model")
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt").to(knn.device)
    if inputs["input_ids"].shape[1] == 0:
        raise KNNLMError("the prompt is empty: give at least one token to continue")
    output = knn.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=sample)[0]
    start = inputs["input_ids"].shape[1]
    facts: dict[str, Any] = {"prompt": prompt, "text": tokenizer.decode(output[start:])}
    found = knn.explain(output, top=64, tokenizer=tokenizer)[start - 1 : -1] if explain else []
    if as_json:
        if explain:
            facts["explanation"] = [asdict(position) for position in found]
        return show(facts, as_json)
    typer.echo(prompt + facts["text"])
    if explain:
        Console().print(sources(found))
    return None
