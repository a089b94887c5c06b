"""What does a head's training loss cost without its logits? Against the plain version, in turn.

    python benchmarks/head_loss.py                     # 4,096 tokens, n=3, V=50,257, D=768
    python benchmarks/head_loss.py --tokens 2048 --n 1 --vocab 8192 --dim 256 --json out.json

Prints the speed of forward and backward as a ratio to the plain version's (logits, then autograd),
each version's peak memory beyond its inputs, and the difference of their results.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
from collections.abc import Callable

import torch
from timing import machine, paired, quantiles, ratios
from torch import Tensor

from knnlm_hf.memory.head_loss import head_loss


def plain(hidden_QD: Tensor, rows_RD: Tensor, bias: None, target_rows_QM: Tensor) -> Tensor:
    logits_QR = hidden_QD @ rows_RD.T
    own_QM = logits_QR.gather(1, target_rows_QM)
    return (logits_QR.float().logsumexp(1) - own_QM.float().logsumexp(1)).mean()


VERSIONS: dict[str, Callable[..., Tensor]] = {"plain": plain, "head_loss": head_loss}


class Case:
    """Inputs of one size, the same in every process."""

    def __init__(self, options: argparse.Namespace) -> None:
        generator = torch.Generator().manual_seed(0)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, options.dtype)
        rows = options.n * options.vocab
        self.hidden = torch.randn(options.tokens, options.dim, generator=generator)
        self.rows = torch.randn(rows, options.dim, generator=generator) * options.dim**-0.5
        tokens = torch.randint(options.vocab, (options.tokens, 1), generator=generator)
        self.targets = (tokens * options.n + torch.arange(options.n)).to(device)
        self.hidden = self.hidden.to(device, dtype).requires_grad_()
        self.rows = self.rows.to(device, dtype).requires_grad_()

    def step(self, version: str) -> int:
        """Forward and backward; return the tokens."""
        self.hidden.grad = self.rows.grad = None
        VERSIONS[version](self.hidden, self.rows, None, self.targets).backward()
        return len(self.hidden)

    def results(self, version: str) -> list[Tensor]:
        """The loss and both gradients."""
        self.hidden.grad = self.rows.grad = None
        loss = VERSIONS[version](self.hidden, self.rows, None, self.targets)
        loss.backward()
        return [loss.detach(), self.hidden.grad.clone(), self.rows.grad.clone()]


def peak_bytes(options: argparse.Namespace, version: str) -> int:
    """Peak memory of one step beyond what its inputs take; in a process of its own on a CPU."""
    if torch.cuda.is_available():
        case = Case(options)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        case.step(version)
        return torch.cuda.max_memory_allocated() - before
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_here, (options, version))


def _peak_here(options: argparse.Namespace, version: str) -> int:
    torch.set_num_threads(options.threads)
    case = Case(options)
    small = [torch.ones(4, 4, requires_grad=True) for _ in range(2)]
    VERSIONS[version](*small, None, torch.zeros(4, 1, dtype=torch.long)).backward()  # libraries
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    case.step(version)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("tokens", 4096), ("n", 3), ("vocab", 50_257), ("dim", 768)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    memory = {version: peak_bytes(options, version) for version in VERSIONS}
    case = Case(options)
    rates = paired({version: lambda v=version: case.step(v) for version in VERSIONS}, options.runs)
    pairs = zip(case.results("head_loss"), case.results("plain"), strict=True)
    difference = [float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in pairs]
    report = {
        "settings": vars(options) | machine(),
        "tokens_per_second": {version: quantiles(values) for version, values in rates.items()},
        "speed_ratio": ratios(rates, "plain")["head_loss"],
        "peak_bytes": memory,
        "memory_ratio": memory["head_loss"] / memory["plain"],
        "largest_difference": dict(zip(("loss", "hidden", "rows"), difference, strict=True)),
    }
    print(json.dumps(report, indent=2))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=2)


if __name__ == "__main__":
    main()
