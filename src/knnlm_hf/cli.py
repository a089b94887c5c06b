"""The `knnlm` command: each subcommand is a thin face of one function of the library."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from knnlm_hf import __version__
from knnlm_hf.errors import CorpusError, KNNLMError

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

Model = Annotated[str, typer.Argument(help="Folder or Hub id of a causal or a kNN model.")]
Corpus = Annotated[
    str,
    typer.Argument(
        help="A text file (one document), a .jsonl/.csv/.parquet file, or a Hub dataset id."
    ),
]
Store = Annotated[str, typer.Argument(help="Folder of a datastore, or its Hub dataset id.")]
OptionalStore = Annotated[
    str | None, typer.Argument(help="The datastore; not needed where MODEL is a kNN model.")
]
Window = Annotated[int | None, typer.Option(help="Input tokens per window [model's context].")]
Stride = Annotated[int | None, typer.Option(help="New tokens per window [half the window].")]
BatchSize = Annotated[int, typer.Option(help="Windows per forward pass.")]
Split = Annotated[str, typer.Option(help="Split of a dataset.")]
Lines = Annotated[bool, typer.Option("--lines", help="Each line of a text file is a document.")]
Dtype = Annotated[str | None, typer.Option("--model-dtype", help="float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, … [cuda where there is one].")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")]
K = Annotated[int | None, typer.Option("--k", help="Neighbours per query [1024].")]
Temperature = Annotated[float | None, typer.Option(help="t > 0 [from the data].")]
Lmbda = Annotated[float | None, typer.Option(help="0 <= lambda < 1 [0.25].")]
Metric = Annotated[str, typer.Option(help="l2 or ip.")]
Index = Annotated[str, typer.Option(help="auto, exact, or a factory string that was built.")]
Rescore = Annotated[bool, typer.Option("--rescore", help="True similarities from stored keys.")]


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

    base, tokenizer = _load(model, model_dtype, device)
    built = Datastore.build(
        base, _corpus(corpus, split, lines), store, tokenizer=tokenizer, layer=layer,
        window=window, stride=stride, batch_size=batch_size, dtype=dtype, shard_size=shard_size,
    )  # fmt: skip
    if index != "none":
        built.build_index(index, metric=metric)
    _print(_store_facts(built), as_json)


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
    _print(built.info.to_dict() if built.info else {"spec": spec}, as_json)


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

    knn, tokenizer = _wrap(model, store, model_dtype, device, None, k, None, metric, index, rescore)
    best = fit(
        knn, _corpus(corpus, split, lines), tokenizer=tokenizer,
        window=window, stride=stride, batch_size=batch_size,
    )  # fmt: skip
    if out is not None:
        knn.save_pretrained(out)
        if tokenizer is not None:
            tokenizer.save_pretrained(out)
    _print({**asdict(best), "helps": best.helps}, as_json)


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

    knn, tokenizer = _wrap(
        model, store, model_dtype, device, lmbda, k, temperature, metric, index, rescore
    )
    report = perplexity(
        knn, _corpus(corpus, split, lines), tokenizer=tokenizer,
        window=window, stride=stride, batch_size=batch_size,
    )  # fmt: skip
    facts = {**asdict(report), "lmbda": knn.lmbda}
    if as_json:
        return _print(facts, as_json)
    table = Table("", "perplexity", "per word", title=f"{corpus}: {report.tokens:,} tokens")
    word = report.word_perplexity, report.base_word_perplexity
    table.add_row("model alone", _number(report.base_perplexity), _number(word[1]))
    table.add_row("memory alone", _number(report.memory_perplexity), "")
    table.add_row(f"mixture (lambda {knn.lmbda:.3g})", _number(report.perplexity), _number(word[0]))
    table.add_row("better of the two per token", _number(report.oracle_perplexity), "")
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

    knn, tokenizer = _wrap(
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
        return _print(facts, as_json)
    typer.echo(prompt + facts["text"])
    if explain:
        Console().print(sources(found))
    return None


@app.command()
def info(store: Store, as_json: Json = False) -> None:
    """What a datastore is: size, layer, model, indexes."""
    from knnlm_hf import Datastore

    _print(_store_facts(Datastore.open(store)), as_json)


@app.command()
def verify(store: Store, as_json: Json = False) -> None:
    """Read a whole datastore and compare it with its checksums."""
    from knnlm_hf import Datastore

    opened = Datastore.open(store)
    opened.verify(progress=True)
    _print({"store": str(opened.path), "entries": len(opened), "verified": True}, as_json)


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
    _print({"pushed": str(folder), "to": str(url)}, as_json)


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
        _print(facts, as_json)


def _load(name: str, dtype: str | None, device: str | None) -> tuple[Any, Any]:
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
        raise KNNLMError(f"model {name}: {_first_line(error)}") from error
    try:
        return loaded, AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        return loaded, None


def _wrap(
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

    model, tokenizer = _load(name, dtype, device)
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


def _corpus(name: str, split: str, lines: bool) -> Any:
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
        raise CorpusError(f"corpus {name}: {_first_line(error)}") from error


def _store_facts(store: Any) -> dict[str, Any]:
    from knnlm_hf import identity
    from knnlm_hf.index import built_indexes

    size = sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file())
    indexes = built_indexes(store.path / "indexes")
    return {
        "store": str(store.path),
        "entries": len(store),
        "documents": store.documents,
        "layer": store.layer,
        "dim": store.dim,
        "dtype": str(store.dtype).removeprefix("torch."),
        "model": identity.name(store.manifest.model),
        "bytes": size,
        "indexes": [f"{found.factory} ({found.metric})" for _, found in indexes],
    }


def _print(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        # JSON has no infinity: a perplexity of ∞ is the string "inf".
        plain = {k: str(v) if v in (float("inf"),) else v for k, v in facts.items()}
        typer.echo(json.dumps(plain, default=str))
        return
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        table.add_row(name, f"{shown:,}" if isinstance(shown, int) else str(shown))
    Console().print(table)


def _number(value: float | None) -> str:
    return "–" if value is None else "∞" if value == float("inf") else f"{value:.2f}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def main() -> None:
    """Entry point of the `knnlm` command."""
    app()


if __name__ == "__main__":
    main()
