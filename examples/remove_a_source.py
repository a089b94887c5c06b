"""Which documents does the model lean on, and what does it say without the heaviest?

python examples/remove_a_source.py                                    # no download: a small model
python examples/remove_a_source.py --model gpt2 --corpus mine.txt     # yours
"""

import shutil
from collections import Counter

import torch
from common import arguments, load_model, load_texts

from knnlm_hf import Datastore, KNNLMForCausalLM, tune


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--out", default="stores/remove_a_source")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model)
    train, valid, test = load_texts(args.corpus)
    shutil.rmtree(args.out, ignore_errors=True)
    store = Datastore.build(model, train, args.out, tokenizer=tokenizer)
    knn = KNNLMForCausalLM(model, store)
    print(tune(knn, valid, tokenizer=tokenizer).message)

    ids = tokenizer(test[0], return_tensors="pt").input_ids[:, :32]
    weights: Counter[int] = Counter()
    for position in knn.explain(ids, top=256):
        for neighbour in position.neighbours:
            weights[neighbour.document] += neighbour.weight
    for document, weight in weights.most_common(5):
        print(f"document {document}: {weight:.2f} of {ids.shape[1]} predictions")

    def mean_probability() -> float:
        with torch.no_grad():
            log_probs = knn(ids).logits[0, :-1]
        return float(log_probs.gather(1, ids[0, 1:, None]).exp().mean())

    heaviest = weights.most_common(1)[0][0]
    print(f"mean probability of the text: {mean_probability():.4f}")
    store.remove(heaviest)
    print(f"without document {heaviest}: {mean_probability():.4f}")
    assert heaviest not in {n.document for e in knn.explain(ids, top=256) for n in e.neighbours}


if __name__ == "__main__":
    main()
