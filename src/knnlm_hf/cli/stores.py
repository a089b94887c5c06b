"""`knnlm build`, `index`, `info`, `verify` and `push`: what lies in folders and on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from knnlm_hf.cli.groups import Loading, Reading, grouped
from knnlm_hf.cli.inputs import load_corpus, load_model
from knnlm_hf.cli.options import Corpus, Json, Model, Source, Store
from knnlm_hf.cli.outputs import head_facts, show, store_facts
from knnlm_hf.errors import KNNLMError, PersistenceError

app = typer.Typer()

IndexMetric = Annotated[str, typer.Option(help="l2 or ip.")]


@app.command()
@grouped
def build(
    model: Model,
    corpus: Corpus,
    store: Annotated[Path, typer.Argument(help="Folder to make; an unfinished one is continued.")],
    layer: Annotated[str, typer.Option(help="att, ffn, final or a module path.")] = "att",
    dtype: Annotated[str, typer.Option(help="Of the keys.")] = "float16",
    shard_size: Annotated[int, typer.Option(help="Entries per file.")] = 1 << 20,
    index: Annotated[str, typer.Option(help="Index to build: auto, none, or a factory.")] = "auto",
    metric: IndexMetric = "l2",
    reading: Reading = Reading(split="train"),  # noqa: B008 - frozen
    loading: Loading = Loading(),  # noqa: B008
    as_json: Json = False,
) -> None:
    """Build a datastore of MODEL's states over CORPUS, and its index."""
    from knnlm_hf import Datastore

    base, tokenizer = load_model(model, loading.model_dtype, loading.device)
    built = Datastore.build(
        base, load_corpus(corpus, reading.split, reading.lines), store, tokenizer=tokenizer,
        layer=layer, dtype=dtype, shard_size=shard_size, **reading.windows,
    )  # fmt: skip
    if index != "none":
        built.build_index(index, metric=metric)
    show(store_facts(built), as_json)


@app.command()
def index(
    store: Store,
    spec: Annotated[str, typer.Argument(help="auto, exact, or a FAISS factory string.")] = "auto",
    metric: IndexMetric = "l2",
    nprobe: Annotated[int | None, typer.Option(help="Lists searched per query.")] = None,
    as_json: Json = False,
) -> None:
    """Build an index for an existing datastore."""
    from knnlm_hf import Datastore

    built = Datastore.open(store).build_index(spec, metric=metric, nprobe=nprobe)
    show(built.info.to_dict() if built.info else {"spec": spec}, as_json)


@app.command()
def info(source: Source, as_json: Json = False) -> None:
    """What a datastore is (size, layer, model, indexes), or a trained head."""
    from knnlm_hf.memory import Head, open_source

    opened = open_source(source)
    is_head = isinstance(opened, Head)
    show(head_facts(opened, source) if is_head else store_facts(opened), as_json)


@app.command()
def verify(source: Source, as_json: Json = False) -> None:
    """Read a whole datastore and compare it with its checksums; or all numbers of a head."""
    from knnlm_hf.memory import Head, open_source

    opened = open_source(source)
    if isinstance(opened, Head):
        for name, tensor in opened.state_dict().items():
            if not bool(tensor.isfinite().all()):
                raise PersistenceError(f"{source}: tensor {name!r} has numbers that are not finite")
        return show({"head": source, "verified": True}, as_json)
    opened.verify(progress=True)
    return show({"store": str(opened.path), "entries": len(opened), "verified": True}, as_json)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a datastore, a head or a kNN model.")],
    repo: Annotated[str, typer.Argument(help="Hub repository, user/name.")],
    private: Annotated[bool, typer.Option("--private")] = False,
    as_json: Json = False,
) -> None:
    """Upload a datastore (as a dataset, indexes included), a head or a kNN model to the Hub."""
    from knnlm_hf import Datastore
    from knnlm_hf.memory import Head
    from knnlm_hf.memory.head_files import is_head
    from knnlm_hf.persistence import push_folder

    if is_head(folder):
        url = Head.from_pretrained(folder).push_to_hub(repo, private=private)
    elif (folder / "manifest.json").is_file():
        url = Datastore.open(folder).push_to_hub(repo, private=private)
    elif (folder / "config.json").is_file():
        url = push_folder(folder, repo, "model", private=private)
    else:
        raise KNNLMError(
            f"{folder} is neither a datastore (manifest.json) nor a head or a saved model"
        )
    show({"pushed": str(folder), "to": str(url)}, as_json)
