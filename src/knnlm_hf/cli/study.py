"""`knnlm study`: why it works, on your model and corpus."""

from __future__ import annotations

import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from knnlm_hf.cli.inputs import load_corpus, load_model
from knnlm_hf.cli.options import Device, Dtype, Json, Lines, Model
from knnlm_hf.cli.outputs import show
from knnlm_hf.errors import KNNLMError

app = typer.Typer(
    no_args_is_help=True, help="Run the paper's experiments on your own model and corpus."
)

Train = Annotated[str, typer.Option("--train", help="Corpus of the datastore.")]
Valid = Annotated[str, typer.Option("--valid", help="Corpus that settings are tuned on.")]
Test = Annotated[str, typer.Option("--test", help="Corpus that is reported.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for everything; a killed run resumes.")]
Only = Annotated[
    list[str] | None,
    typer.Option(
        "--only", metavar="NAME…",
        help="Experiments to run: repeat it, or 'a,b' or 'a b' in one value; see knnlm study list.",
    ),
]  # fmt: skip
Quick = Annotated[
    bool, typer.Option("--quick", help="Ten minutes for a small model: samples of everything.")
]


@app.command()
def run(
    model: Model,
    train: Train,
    valid: Valid,
    test: Test,
    out: Out,
    only: Only = None,
    quick: Quick = False,
    store: Annotated[
        list[str] | None, typer.Option("--store", help="A finished datastore to use; repeatable.")
    ] = None,
    train_tokens: Annotated[
        int | None, typer.Option(min=1, help="Training tokens used, from the beginning [all].")
    ] = None,
    eval_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens scored of valid and of test [all].")
    ] = None,
    exact_comparisons: Annotated[
        float | None, typer.Option(help="Queries x entries of one exact search [6e10].")
    ] = None,
    layer: Annotated[
        list[str] | None, typer.Option(help="A layer to compare; repeatable [att and ffn].")
    ] = None,
    k: Annotated[int | None, typer.Option(min=1, help="Neighbours per query [1024].")] = None,
    head_tokens: Annotated[
        int | None, typer.Option(min=1, help="Examples that training a head may see [its recipe].")
    ] = None,
    head_negatives: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens that stand for the rest in a head's step [all]."),
    ] = None,
    head_dtype: Annotated[
        str | None, typer.Option(help="Of a head's products: float32 or bfloat16 [float32].")
    ] = None,
    lm_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens that training a model may see [its recipe].")
    ] = None,
    most_settings: Annotated[
        int | None, typer.Option(min=1, help="Settings of a sweep that are trained [all].")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Windows per forward.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of every random choice.")] = None,
    lines: Lines = False,
    model_dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Run the experiments on MODEL that are not finished in --out, and write the report."""
    from knnlm_hf import study

    given = {
        "train_tokens": train_tokens, "eval_tokens": eval_tokens, "k": k, "seed": seed,
        "exact_comparisons": exact_comparisons, "head_tokens": head_tokens,
        "layers": tuple(layer) if layer else None,
        "head_negatives": head_negatives, "head_dtype": head_dtype,
        "lm_tokens": lm_tokens, "most_settings": most_settings, "batch_size": batch_size,
    }  # fmt: skip
    settings: dict[str, Any] = dict(study.QUICK) if quick else {}
    settings |= {name: value for name, value in given.items() if value is not None}
    base, tokenizer = load_model(model, model_dtype, device)
    one = study.Study(
        base, tokenizer, train=load_corpus(train, "train", lines),
        valid=load_corpus(valid, "validation", lines), test=load_corpus(test, "test", lines),
        folder=out, stores=store or (), settings=study.Settings(**settings),
    )  # fmt: skip
    try:
        results = study.run(one, _names(only), command=shlex.join(["knnlm", *sys.argv[1:]]))
    except BaseException:  # what is finished is reported, though something failed or was stopped
        with suppress(KNNLMError):  # nothing is
            study.report(out)
        raise
    page = study.report(out)
    show({**{r["experiment"]: r["verdict"] for r in results}, "report": str(page)}, as_json)


def _names(given: list[str] | None) -> list[str] | None:
    """The experiments that --only names, in any of its ways; None: it was not given."""
    if given is None:
        return None
    names = " ".join(given).replace(",", " ").split()
    if not names:
        raise KNNLMError("--only names no experiment: see knnlm study list, or leave it away")
    return names


@app.command("list")
def list_experiments(as_json: Json = False) -> None:
    """The experiments, in the order of the paper's rows."""
    from knnlm_hf.study import all_experiments

    facts = {e.name: f"{e.row}. {e.title}: {e.finding}" for e in all_experiments()}
    show(facts, as_json)


@app.command()
def report(
    out: Annotated[Path, typer.Argument(help="Folder of a study.")], as_json: Json = False
) -> None:
    """Write the HTML page and its Markdown twin from the results that are there."""
    from knnlm_hf import study

    show({"report": str(study.report(out))}, as_json)
