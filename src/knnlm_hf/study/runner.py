"""Run experiments one after the other; what is finished stays finished."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape

import knnlm_hf
from knnlm_hf import identity
from knnlm_hf.errors import KNNLMError, first_line
from knnlm_hf.study import catalogue
from knnlm_hf.study.catalogue import Experiment
from knnlm_hf.study.study import Study
from knnlm_hf.study.workspace import digest, read_json, write_json, writing

_log = logging.getLogger(__name__)

RESULTS = "results"
"""Folder of the results: one JSON file per experiment, and `study.json`."""
_PACKAGES = ("torch", "transformers", "faiss-cpu", "faiss-gpu", "numpy", "safetensors")


def run(
    study: Study, only: Sequence[str] | None = None, *, command: str = ""
) -> list[dict[str, Any]]:
    """Run the experiments that are not finished, and return the results of all that were asked for.

    An experiment is finished if its result is there and was made from the same model, texts,
    settings and code, which is that of the whole study: once it has changed, all rows are run
    again, on what is kept of the models, searches and heads. A run that is killed goes on where it
    was, with all that it had made. One that fails does not keep the others from running.

    Args:
        study: what they are run on.
        only: names of experiments; None: all.
        command: what the report shall say made it.

    Raises:
        KNNLMError: an unknown name; another study is running in the folder; or, once all the
            others are finished, what experiments failed and why.
        PersistenceError: the folder cannot be written.
    """
    experiments = catalogue.chosen(only)
    folder = study.workspace.folder / RESULTS
    lock = _locked(study.workspace.folder)
    try:
        write_json(folder / "study.json", _facts(study))
        return _run_all(study, experiments, folder, command)
    finally:
        lock.release()


def _locked(folder: Path) -> FileLock:
    lock = FileLock(folder / ".lock", timeout=0)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as error:
            raise KNNLMError(
                f"{folder}: another study is running there: wait for it, or choose another folder"
            ) from error
    return lock


def _run_all(
    study: Study, experiments: list[Experiment], folder: Path, command: str
) -> list[dict[str, Any]]:
    say = Console(stderr=True, quiet=not study.show).print
    code = catalogue.code()
    wanted = {e.name: digest([study.inputs, e.name, code]) for e in experiments}
    done = {e.name: read_json(folder / f"{e.name}.json") for e in experiments}
    done = {name: result for name, result in done.items() if _is_current(result, wanted[name])}
    left = [e for e in experiments if e.name not in done]
    _plan(study, left, len(done), say)
    failed: list[str] = []
    for number, experiment in enumerate(left, start=1):
        say(f"[bold]{number} of {len(left)}: {experiment.title}[/bold] ({experiment.name})")
        try:
            result = _run_one(study, experiment, wanted[experiment.name]) | {"command": command}
        except Exception as error:  # whatever it is, hours of others' work shall not be lost to it
            _log.debug("%s failed", experiment.name, exc_info=True)
            failed.append(f"{experiment.name}: {first_line(error)}")
            say(f"  failed: {escape(first_line(error))}")
            continue
        write_json(folder / f"{experiment.name}.json", result)
        done[experiment.name] = result
        rest = _estimate(study, left[number:])
        say(
            f"  {result['verdict']}: {escape(result['sentence'])}\n"
            f"  {result['seconds']:.0f} s; {len(left) - number} left{rest}"
        )
    if failed:
        raise KNNLMError(f"{len(failed)} of {len(left)} experiments failed: {'; '.join(failed)}")
    return [done[e.name] for e in experiments]


def _run_one(study: Study, experiment: Experiment, inputs: str) -> dict[str, Any]:
    spent = study.workspace.spent
    spent.clear()
    begun = time.perf_counter()
    outcome = experiment.function()(study).to_dict()
    seconds = time.perf_counter() - begun + sum(spent.values())  # what it costs from nothing
    seed = study.settings.seed
    return {
        "experiment": experiment.name,
        "title": experiment.title,
        "row": experiment.row,
        "section": experiment.section,
        "hypothesis": experiment.hypothesis,
        "finding": experiment.finding,
        **outcome,
        "rows": [{"seed": seed, "split": "test", **row} for row in outcome["rows"]],
        "seconds": seconds,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "settings": study.settings.to_dict(),
        "of": _of(study),
        "inputs": inputs,
    }


def _is_current(result: Any, inputs: str) -> bool:
    return isinstance(result, dict) and result.get("inputs") == inputs


def _plan(study: Study, left: list[Experiment], done: int, say: Any) -> None:
    say(f"{len(left)} experiments to run, {done} finished{_estimate(study, left)}")
    for experiment in left:
        cost = experiment.cost(study)
        shown = "" if cost is None else f", about {_time(cost)}"
        say(f"  {experiment.row:>2} {experiment.title}{shown}")


def _estimate(study: Study, left: list[Experiment]) -> str:
    costs = [cost for cost in (e.cost(study) for e in left) if cost is not None]
    return f", about {_time(sum(costs))} on two cores" if costs else ""


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def versions() -> dict[str, str]:
    """Versions of what figures depend on."""
    found = {"knnlm_hf": knnlm_hf.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _of(study: Study) -> dict[str, str]:
    """Digests of the model and the texts: results are reported together where these are equal."""
    return {name: value for name, value in study.inputs.items() if name != "settings"}


def _facts(study: Study) -> dict[str, Any]:
    """What the report says of the study as a whole."""
    return {
        "model": identity.name(identity.describe(study.model)),
        "architecture": type(study.model).__name__,
        "parameters": sum(p.numel() for p in study.model.parameters()),
        "vocabulary": study.vocab_size,
        "layers": list(study.layers),
        "window": study.window,
        "stride": study.stride,
        "tokens": {split: len(study.text(split)) for split in ("train", "valid", "test")},
        "machine": f"{platform.machine()}, {platform.system()}",
        "of": _of(study),
    }
