"""The arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="Folder or Hub id of a causal or a kNN model.")]
Corpus = Annotated[
    str,
    typer.Argument(
        help="A text file (one document), a .jsonl/.csv/.parquet file, or a Hub dataset id."
    ),
]
Store = Annotated[str, typer.Argument(help="Folder of a datastore, or its Hub dataset id.")]
Source = Annotated[str, typer.Argument(help="Folder or Hub id of a datastore or a trained head.")]
OptionalMemory = Annotated[
    str | None,
    typer.Argument(help="A datastore or trained head; not needed where MODEL is a kNN model."),
]
MoreMemories = Annotated[
    list[str] | None, typer.Option("--memory", help="A further one; repeat for several.")
]
Window = Annotated[
    int | None, typer.Option(help="Input tokens per window; default: the model's context.")
]
Stride = Annotated[
    int | None, typer.Option(help="New tokens per window; default: half the window.")
]
BatchSize = Annotated[int, typer.Option(help="Windows per forward pass.")]
Split = Annotated[str, typer.Option(help="Split of a dataset.")]
Lines = Annotated[bool, typer.Option("--lines", help="Each line of a text file is a document.")]
Dtype = Annotated[str | None, typer.Option("--model-dtype", help="float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, …; default: cuda where there is one.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")]
CacheSize = Annotated[
    int | None,
    typer.Option(
        "--cache", min=1, help="Remember the text's own last so many tokens too (try 4096)."
    ),
]
K = Annotated[int | None, typer.Option("--k", help="Neighbours per query; default: 1024.")]
Temperature = Annotated[float | None, typer.Option(help="t > 0; default: from the data.")]
Lmbda = Annotated[
    list[float] | None,
    typer.Option(help="0 <= lambda < 1, of several memories one for each; default: 0.25 in all."),
]
Metric = Annotated[str | None, typer.Option(help="l2 or ip; default: l2.")]
Index = Annotated[
    str | None, typer.Option(help="auto, exact, or a factory string that was built; default: auto.")
]
MatchLength = Annotated[
    int | None,
    typer.Option(
        "--match-length", min=1,
        help="Weigh neighbours by the tokens just before, so many at most (try 3).",
    ),
]  # fmt: skip
MatchWeight = Annotated[
    float | None,
    typer.Option("--match-weight", help="Factor e^weight for each such token; default: 1."),
]
Rescore = Annotated[bool, typer.Option("--rescore", help="True similarities from stored keys.")]
