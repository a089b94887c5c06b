"""The `knnlm` command and its subcommands: each is a thin face of one function of the library."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from knnlm_hf import __version__
from knnlm_hf.cli import explain, heads, mixing, store_edits, stores, study
from knnlm_hf.cli.options import Json
from knnlm_hf.cli.outputs import show
from knnlm_hf.errors import KNNLMError

# torch, transformers and faiss are imported by the commands that need them: `--help` stays quick.

_RESUMABLE = ("build", "append", "train-head", "study")


class _Group(TyperGroup):
    """Turns every refusal of the library into one line on stderr and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KNNLMError as error:
            line = " ".join(str(error).splitlines())  # a name may have several
            typer.echo(f"error: {line}", err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt:
            go_on = ": run the same command again to go on from here"
            is_kept = ctx.invoked_subcommand in _RESUMABLE
            typer.echo(f"interrupted{go_on if is_kept else ''}", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    help="Nearest-neighbour language models for Hugging Face transformers.",
    pretty_exceptions_enable=False,
)
for part in (stores.app, store_edits.app, heads.app, mixing.app, explain.app):
    app.add_typer(part)
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
