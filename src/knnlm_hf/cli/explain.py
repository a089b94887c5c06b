"""`knnlm explain`: a page that shows who predicted each token of a text, and from where."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from knnlm_hf.cli.groups import Loading, Memories, Mixture, grouped
from knnlm_hf.cli.inputs import load_knn
from knnlm_hf.cli.options import Json, Model, Stride, Window
from knnlm_hf.cli.outputs import show
from knnlm_hf.errors import CorpusError, KNNLMError, first_line

app = typer.Typer()

_INPUT = "-"


@app.command()
@grouped
def explain(
    model: Model,
    text: Annotated[str, typer.Argument(help="A text file, or - for standard input.")],
    memories: Memories,
    mixture: Mixture,
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("page.html"),
    top: Annotated[int, typer.Option(help="Nearest neighbours shown of each token.")] = 5,
    tokens: Annotated[int, typer.Option(help="Show the first so many of a longer text.")] = 2048,
    window: Window = None,
    stride: Stride = None,
    loading: Loading = Loading(),  # noqa: B008 - frozen
    as_json: Json = False,
) -> None:
    """Show TEXT on an HTML page: who predicted each token, model or memory, and from where."""
    from knnlm_hf.inspection import read, render

    words = _read(text)
    if out.is_dir() or not out.parent.is_dir():
        raise KNNLMError(f"{out}: name a file in a folder that exists with --out")
    knn, tokenizer = load_knn(model, loading, memories, mixture)
    reading = read(knn, words, tokenizer, top=top, limit=tokens, window=window, stride=stride)
    page = render(reading, "Standard input" if text == _INPUT else Path(text).name).encode()
    _write(out, page)
    facts = {
        "page": str(out), "bytes": len(page), "tokens": len(reading.tokens), "cut": reading.is_cut,
        "base_perplexity": reading.base_perplexity,
        "memory_perplexity": reading.memory_perplexity, "perplexity": reading.perplexity,
    }  # fmt: skip
    show(facts, as_json)


def _read(name: str) -> str:
    try:
        if name == _INPUT:
            return typer.get_text_stream("stdin", encoding="utf-8", errors="strict").read()
        return Path(name).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{name}: not UTF-8 text ({error.reason})") from error
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise CorpusError(f"{name}: cannot be read: {first_line(error)}") from error


def _write(path: Path, page: bytes) -> None:
    from knnlm_hf.datastore import atomic

    try:
        atomic.write_bytes(path, page)
    except OSError as error:
        raise KNNLMError(f"{path}: cannot write the page: {error.strerror}") from error
