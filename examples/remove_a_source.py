"""Which documents does the model lean on, and what does it say without one of them?

    python examples/remove_a_source.py MODEL STORE "a prompt to continue"

Prints the documents whose entries weighed most in a continuation, removes the heaviest from a copy
of the store, and shows the probability of the same tokens without it.
"""

import argparse
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from knnlm_hf import Datastore, KNNLMForCausalLM, KNNMemory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("store")
    parser.add_argument("prompt")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    knn = KNNLMForCausalLM(model, KNNMemory(args.store))
    inputs = tokenizer(args.prompt, return_tensors="pt")
    output = knn.generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=0)[0]
    start = inputs["input_ids"].shape[1]
    print(tokenizer.decode(output))

    weights: Counter[int] = Counter()
    for position in knn.explain(output, top=64)[start - 1 : -1]:
        for neighbour in position.neighbours:
            weights[neighbour.document] += neighbour.weight
    for document, weight in weights.most_common(5):
        print(f"document {document}: {weight:.2f} of {len(output) - start} tokens")
    heaviest = weights.most_common(1)[0][0]

    def mean_probability(memory: KNNMemory) -> float:
        with torch.no_grad():
            logits = KNNLMForCausalLM(model, memory)(output[None]).logits[0, start - 1 : -1]
        return logits.gather(1, output[start:, None]).mean().exp().item()

    with tempfile.TemporaryDirectory() as folder:
        store = Datastore.open(shutil.copytree(args.store, Path(folder) / "copy"))
        memory = KNNMemory(store)
        print(f"with document {heaviest}: these tokens {mean_probability(memory):.3f}")
        store.remove([heaviest])  # at once: for this memory too, and whichever index it searches
        print(f"without it: {mean_probability(memory):.3f}")


if __name__ == "__main__":
    main()
