"""`knnlm train-head`: a datastore in, a trained memory out."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from knnlm_hf.cli.inputs import load_model
from knnlm_hf.cli.options import Device, Json, K, Store, Temperature
from knnlm_hf.cli.outputs import head_facts, show
from knnlm_hf.errors import KNNLMError, PersistenceError, SettingError
from knnlm_hf.folders import OURS, finish

app = typer.Typer()


@app.command("train-head")
def train_head(
    store: Store,
    head: Annotated[Path, typer.Argument(help="Folder to make.")],
    kind: Annotated[
        str, typer.Option(help="multi_embedding, mixture_of_softmaxes, mlp or centroids.")
    ] = "multi_embedding",
    n: Annotated[
        int | None, typer.Option("--n", help="Rows per token, components, layers or clusters.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Another setting of the kind, name=value.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the datastore.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Entries per step.")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Epochs without a better held-out loss before it stops.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of every random choice.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of products: float32 or bfloat16.")] = None,
    negatives: Annotated[
        int | None, typer.Option(help="Sampled softmax: tokens drawn per step; default: all.")
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            help="STORE's model (folder or Hub id), whose output rows the head starts at."
        ),
    ] = None,
    distil: Annotated[
        bool, typer.Option("--distil", help="Learn from STORE's kNN memory as well.")
    ] = False,
    alpha: Annotated[
        float | None,
        typer.Option(help="With --distil, the share of the next token's loss; default: 0.5."),
    ] = None,
    k: K = None,
    temperature: Temperature = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Folder written after every epoch; default: HEAD.checkpoint."),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint, or drop it.")] = True,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train a memory on STORE's entries, without the model; an interrupted run is continued."""
    from knnlm_hf import Datastore
    from knnlm_hf.memory import Head
    from knnlm_hf.memory.kinds import class_of

    cls = class_of(kind, Head)
    _check_free(head)
    opened = Datastore.open(store)
    given = {
        "epochs": epochs, "lr": lr, "batch_size": batch_size, "patience": patience,
        "seed": seed, "dtype": dtype, "negatives": negatives,
        "start": None if start is None else load_model(start, None, None)[0],
        **_own_settings(cls, n, settings or []), **_teaching(opened, distil, alpha, k, temperature),
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    with _checkpoint(checkpoint or head.with_name(f"{head.name}.checkpoint"), resume) as folder:
        trained = cls.train_on(opened, checkpoint=folder, device=device, **given)
        trained.save_pretrained(head)
    show(head_facts(trained, str(head)), as_json)


def _check_free(head: Path) -> None:
    """Refuse, before training, a place where there is something already."""
    finish(head)
    if head.exists() and not head.is_dir():
        raise PersistenceError(f"{head}: a file is in the way, expected a folder")
    found = [file.name for file in head.iterdir() if not file.match(OURS)] if head.is_dir() else []
    if found:
        raise PersistenceError(
            f"{head}: holds {min(found)!r} already: delete it, or choose another folder"
        )


def _own_settings(cls: type[Any], n: int | None, texts: list[str]) -> dict[str, Any]:
    """The kind's own settings: `n` is its first, whatever its name."""
    known = inspect.signature(cls).parameters
    names = [name for name in known if name not in ("hidden_size", "vocab_size", "layer")]
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in names:
            raise SettingError(f"--set {text}: expected name=value, with one of {', '.join(names)}")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    if n is not None:
        if not names:
            raise SettingError(f"--n: a {cls.__name__} has no settings of its own")
        found[names[0]] = n
    return found


def _teaching(
    store: Any, distil: bool, alpha: float | None, k: int | None, temperature: float | None
) -> dict[str, Any]:
    if not distil:
        options = {"--alpha": alpha, "--k": k, "--temperature": temperature}
        unused = [name for name, value in options.items() if value is not None]
        if unused:
            raise SettingError(f"{', '.join(unused)}: only with --distil")
        return {}
    from knnlm_hf import KNNMemory

    return {"teacher": KNNMemory(store, 1024 if k is None else k, temperature), "alpha": alpha}


@contextmanager
def _checkpoint(folder: Path, resume: bool) -> Iterator[Path]:
    """The checkpoint's folder; the checkpoint goes once the head is saved, when the block ends."""
    from knnlm_hf.memory.checkpoint import remove_checkpoint

    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not resume:
            remove_checkpoint(folder)
        yield folder
    except OSError as error:
        raise KNNLMError(
            f"{folder}: the checkpoint cannot be written: {error.strerror or error}"
        ) from error
    else:
        remove_checkpoint(folder)
    finally:
        with suppress(OSError):
            folder.rmdir()
