"""The subcommands of `knnlm`: each is a thin face of one function of the library."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from knnlm_hf import __version__
from knnlm_hf.cli import study
from knnlm_hf.cli.inputs import load_corpus, load_knn, load_model
from knnlm_hf.cli.options import (
    BatchSize,
    Corpus,
    Device,
    Dtype,
    Index,
    Json,
    K,
    Lines,
    Lmbda,
    Metric,
    Model,
    OptionalStore,
    Rescore,
    Split,
    Store,
    Stride,
    Temperature,
    Window,
)
from knnlm_hf.cli.outputs import number, show, store_facts
from knnlm_hf.errors import KNNLMError

# torch, transformers and faiss are imported by the commands that need them: `--help` stays quick.


class _Group(TyperGroup):
    """Turns every refusal of the library into one line on stderr and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KNNLMError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt:
            typer.echo("interrupted: run the same command again to go on from here", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    help="Nearest-neighbour language models for Hugging Face transformers.",
    pretty_exceptions_enable=False,
)
app.add_typer(study.app, name="study")


def _version(show: bool) -> None:
    if show:
        typer.echo(f"knnlm-hf {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    logging.basicConfig(format="%(message)s", level=logging.WARNING)


@app.command()
def build(
    model: Model,
    corpus: Corpus,
    store: Annotated[Path, typer.Argument(help="Folder to make; an unfinished one is continued.")],
    layer: Annotated[str, typer.Option(help="att, ffn, final or a module path.")] = "att",
    window: Window = None,
    stride: Stride = None,
    batch_size: BatchSize = 8,
    dtype: Annotated[str, typer.Option(help="Of the keys.")] = "float16",
    shard_size: Annotated[int, typer.Option(help="Entries per file.")] = 1_000_000,
    index: Annotated[str, typer.Option(help="Index to build: auto, none, or a factory.")] = "auto",
    metric: Metric = "l2",
    split: Split = "train",
    lines: Lines = False,
    model_dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Build a datastore of MODEL's states over CORPUS, and its index."""
    from knnlm_hf import Datastore

    base, tokenizer = load_model(model, model_dtype, device)
    built = Datastore.build(
        base, load_corpus(corpus, split, lines), store, tokenizer=tokenizer, layer=layer,
        window=window, stride=stride, batch_size=batch_size, dtype=dtype, shard_size=shard_size,
    )  # fmt: skip
    if index != "none":
        built.build_index(index, metric=metric)
    show(store_facts(built), as_json)


@app.command()
def index(
    store: Store,
    spec: Annotated[str, typer.Argument(help="auto, exact, or a FAISS factory string.")] = "auto",
    metric: Metric = "l2",
    nprobe: Annotated[int | None, typer.Option(help="Lists searched per query.")] = None,
    as_json: Json = False,
) -> None:
    """Build an index for an existing datastore."""
    from knnlm_hf import Datastore

    built = Datastore.open(store).build_index(spec, metric=metric, nprobe=nprobe)
    show(built.info.to_dict() if built.info else {"spec": spec}, as_json)


@app.command()
def tune(
    model: Model,
    corpus: Corpus,
    store: OptionalStore = None,
    out: Annotated[Path | None, typer.Option(help="Save the tuned kNN model here.")] = None,
    k: K = None,
    metric: Metric = "l2",
    index: Index = "auto",
    rescore: Rescore = False,
    window: Window = None,
    stride: Stride = None,
    batch_size: BatchSize = 8,
    split: Split = "validation",
    lines: Lines = False,
    model_dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Fit k, temperature and lambda to held-out text."""
    from knnlm_hf import tune as fit

    knn, tokenizer = load_knn(
        model, store, model_dtype, device, None, k, None, metric, index, rescore
    )
    best = fit(
        knn, load_corpus(corpus, split, lines), tokenizer=tokenizer,
        window=window, stride=stride, batch_size=batch_size,
    )  # fmt: skip
    if out is not None:
        knn.save_pretrained(out)
        if tokenizer is not None:
            tokenizer.save_pretrained(out)
    show({**asdict(best), "helps": best.helps}, as_json)


@app.command("eval")
def evaluate(
    model: Model,
    corpus: Corpus,
    store: OptionalStore = None,
    lmbda: Lmbda = None,
    temperature: Temperature = None,
    k: K = None,
    metric: Metric = "l2",
    index: Index = "auto",
    rescore: Rescore = False,
    window: Window = None,
    stride: Stride = None,
    batch_size: BatchSize = 8,
    split: Split = "test",
    lines: Lines = False,
    model_dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Perplexity of the model, the memory and their mixture, side by side."""
    from knnlm_hf import perplexity

    knn, tokenizer = load_knn(
        model, store, model_dtype, device, lmbda, k, temperature, metric, index, rescore
    )
    report = perplexity(
        knn, load_corpus(corpus, split, lines), tokenizer=tokenizer,
        window=window, stride=stride, batch_size=batch_size,
    )  # fmt: skip
    facts = {**asdict(report), "lmbda": knn.lmbda}
    if as_json:
        return show(facts, as_json)
    table = Table("", "perplexity", "per word", title=f"{corpus}: {report.tokens:,} tokens")
    word = report.word_perplexity, report.base_word_perplexity
    table.add_row("model alone", number(report.base_perplexity), number(word[1]))
    table.add_row("memory alone", number(report.memory_perplexity), "")
    table.add_row(f"mixture (lambda {knn.lmbda:.3g})", number(report.perplexity), number(word[0]))
    table.add_row("better of the two per token", number(report.oracle_perplexity), "")
    Console().print(table, f"{report.tokens_per_second:,.0f} tokens/s")
    return None


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    store: OptionalStore = None,
    explain: Annotated[bool, typer.Option("--explain", help="Sources of each token.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 40,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of greedy.")] = False,
    seed: Annotated[int, typer.Option()] = 0,
    lmbda: Lmbda = None,
    temperature: Temperature = None,
    k: K = None,
    metric: Metric = "l2",
    index: Index = "auto",
    rescore: Rescore = False,
    model_dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Continue PROMPT; with --explain, say where each token came from."""
    import torch

    from knnlm_hf.sources import sources

    knn, tokenizer = load_knn(
        model, store, model_dtype, device, lmbda, k, temperature, metric, index, rescore
    )
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


@app.command()
def info(store: Store, as_json: Json = False) -> None:
    """What a datastore is: size, layer, model, indexes."""
    from knnlm_hf import Datastore

    show(store_facts(Datastore.open(store)), as_json)


@app.command()
def verify(store: Store, as_json: Json = False) -> None:
    """Read a whole datastore and compare it with its checksums."""
    from knnlm_hf import Datastore

    opened = Datastore.open(store)
    opened.verify(progress=True)
    show({"store": str(opened.path), "entries": len(opened), "verified": True}, as_json)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a datastore or of a kNN model.")],
    repo: Annotated[str, typer.Argument(help="Hub repository, user/name.")],
    private: Annotated[bool, typer.Option("--private")] = False,
    as_json: Json = False,
) -> None:
    """Upload a datastore (as a dataset, indexes included) or a saved kNN model to the Hub."""
    from knnlm_hf import Datastore
    from knnlm_hf.persistence import push_folder

    if (folder / "manifest.json").is_file():
        url = Datastore.open(folder).push_to_hub(repo, private=private)
    elif (folder / "config.json").is_file():
        url = push_folder(folder, repo, "model", private=private)
    else:
        raise KNNLMError(f"{folder} is neither a datastore (manifest.json) nor a saved model")
    show({"pushed": str(folder), "to": str(url)}, as_json)


@app.command()
def demo(
    model: Annotated[str | None, typer.Option(help="A pretrained model instead.")] = None,
    corpus: Annotated[str | None, typer.Option(help="A text file of your domain.")] = None,
    out: Annotated[Path, typer.Option(help="Where to keep what it makes.")] = Path(".demo"),
    as_json: Json = False,
) -> None:
    """Show the whole job in two minutes: train, build, tune, evaluate, generate, explain."""
    from knnlm_hf.demo import run

    facts = run(out, model=model, corpus=corpus)
    if as_json:
        show(facts, as_json)
