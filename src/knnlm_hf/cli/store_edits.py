"""`knnlm remove`, `append` and `compact`: a datastore that changes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from knnlm_hf.cli.inputs import load_corpus, load_model
from knnlm_hf.cli.options import Corpus, Device, Dtype, Json, Lines, Model, Split
from knnlm_hf.cli.outputs import show, store_facts

app = typer.Typer()

StoreFolder = Annotated[str, typer.Argument(help="Folder of a datastore.")]


@app.command()
def remove(
    store: StoreFolder,
    documents: Annotated[list[int], typer.Argument(help="Numbers of documents, from 0.")],
    as_json: Json = False,
) -> None:
    """Take documents out of STORE, at once and for good; `compact` frees their space."""
    from knnlm_hf import Datastore

    opened = Datastore.open(store)
    opened.remove(documents)
    show(store_facts(opened), as_json)


@app.command()
def append(
    model: Model,
    corpus: Corpus,
    store: StoreFolder,
    resume: Annotated[
        bool, typer.Option(help="Go on with an interrupted append, or drop what there is of it.")
    ] = True,
    split: Split = "train",
    lines: Lines = False,
    model_dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Add the documents of CORPUS to STORE, with the model and settings it was built with."""
    from knnlm_hf import Datastore

    opened = Datastore.open(store)
    base, tokenizer = load_model(model, model_dtype, device)
    documents = load_corpus(corpus, split, lines)
    grown = opened.append(base, documents, tokenizer=tokenizer, resume=resume)
    show(store_facts(grown), as_json)


@app.command()
def compact(
    store: StoreFolder,
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    as_json: Json = False,
) -> None:
    """Write STORE without the rows of its removed documents to OUT, and verify it."""
    from knnlm_hf import Datastore

    show(store_facts(Datastore.open(store).compact(out)), as_json)
