"""What a user gets: run by `make wheel` in an environment that holds the wheel and nothing else.

    python -I tests/check_install.py

The package works without FAISS and without a test tool; importing it is cheap.
"""

import importlib.util
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LONGEST_IMPORT = 0.5  # seconds


def seconds(code: str) -> float:
    """The best of five runs of a fresh interpreter."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-I", "-c", code], check=True)
        times.append(time.perf_counter() - start)
    return min(times)


def check_import() -> None:
    """Importing takes under half a second, and loads no torch, FAISS or model code."""
    took = seconds("import knnlm_hf") - seconds("pass")
    print(f"import knnlm_hf: {took:.3f} s")
    if took > LONGEST_IMPORT:
        sys.exit(f"importing takes {took:.2f} s, expected {LONGEST_IMPORT} s at most")
    loaded = subprocess.run(
        [sys.executable, "-I", "-c", "import sys, knnlm_hf; print(*sys.modules)"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    heavy = {"torch", "faiss", "transformers", "datasets", "numpy"} & set(loaded)
    if heavy:
        sys.exit(f"importing loads {', '.join(sorted(heavy))}")


def check_use() -> None:
    """Build, search exactly, mix, generate and train a head, on a random model."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from knnlm_hf import Datastore, KNNLMForCausalLM, MultiEmbeddingHead, perplexity, tune

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2,
                   bos_token_id=0, eos_token_id=0, pad_token_id=0)
    ).eval()  # fmt: skip
    texts = torch.randint(1, 50, (8, 40)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        store = Datastore.build(model, texts, Path(folder) / "store", progress=False)
        head = MultiEmbeddingHead.train_on(store, n=1, epochs=1, progress=False)
        for memory in (store, head):
            knn = KNNLMForCausalLM(model, memory)
            tune(knn, texts[:2], progress=False)
            assert perplexity(knn, texts[2:4], progress=False).perplexity > 1
            assert knn.generate(torch.tensor([[3, 9]]), max_new_tokens=3).shape == (1, 5)


def main() -> None:
    for name in ("faiss", "pytest", "matplotlib", "peft", "accelerate"):
        if importlib.util.find_spec(name):
            sys.exit(f"{name} is installed: this is no empty environment")
    check_import()
    check_use()
    command = Path(sys.executable).with_name("knnlm")
    version = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    import knnlm_hf

    assert version.stdout.split()[-1] == knnlm_hf.__version__
    print(f"{version.stdout.strip()}: works in an empty environment")


if __name__ == "__main__":
    main()
