"""Which documents does the model lean on, and what does it say without one of them?

    python examples/remove_a_source.py MODEL STORE "a prompt to continue"

Prints the documents whose entries weighed most in a continuation, then builds a second memory that
excludes the heaviest and shows the probability of the same tokens without it.
"""

import argparse
from collections import Counter

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from knnlm_hf import Datastore, KNNLMForCausalLM, KNNMemory
from knnlm_hf.interpolation import knn_log_probs


class Without(KNNMemory):
    """A kNN memory that ignores every entry of one document."""

    document: int

    def log_probs(self, hidden: torch.Tensor) -> torch.Tensor:
        """As the kNN memory's, with that document's entries made missing hits."""
        near = self.search(hidden.reshape(-1, hidden.shape[-1]))
        is_theirs = self.store.document(near.ids) == self.document
        similarity = near.similarity.masked_fill(is_theirs, -torch.inf)
        found = knn_log_probs(similarity, near.tokens, self.temperature, self.vocab_size)
        return found.reshape(*hidden.shape[:-1], self.vocab_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("store")
    parser.add_argument("prompt")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    store = Datastore.open(args.store)
    knn = KNNLMForCausalLM(model, KNNMemory(store))
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

    without = Without(store)
    without.document = weights.most_common(1)[0][0]
    for name, memory in (("with", knn.memory), (f"without {without.document}", without)):
        wrapped = KNNLMForCausalLM(model, memory)
        with torch.no_grad():
            log_probs = wrapped(output[None]).logits[0, start - 1 : -1]
        kept = log_probs.gather(1, output[start:, None]).mean().exp().item()
        print(f"{name}: mean probability of these tokens {kept:.3f}")


if __name__ == "__main__":
    main()
