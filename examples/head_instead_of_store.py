"""How much of a datastore's gain does a head keep, at which size?

python examples/head_instead_of_store.py                                  # no download
python examples/head_instead_of_store.py --model gpt2 --corpus mine.txt   # yours
"""

import shutil

from common import arguments, load_model, load_texts

from knnlm_hf import Datastore, KNNLMForCausalLM, MultiEmbeddingHead, perplexity, tune


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--out", default="stores/head_instead_of_store")
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()
    model, tokenizer = load_model(args.model)
    train, valid, test = load_texts(args.corpus)
    shutil.rmtree(args.out, ignore_errors=True)
    store = Datastore.build(model, train, args.out, tokenizer=tokenizer)
    keys = len(store) * store.dim
    memories = [("datastore", store, keys)]
    for n in (1, 3):
        head = MultiEmbeddingHead.train_on(store, n=n, epochs=args.epochs)
        memories.append((f"{n} rows per token", head, head.weight.numel()))
    for name, memory, numbers in memories:
        knn = KNNLMForCausalLM(model, memory)
        tune(knn, valid, tokenizer=tokenizer)
        report = perplexity(knn, test, tokenizer=tokenizer)
        ratio = report.perplexity / report.base_perplexity
        print(f"{name:18} {numbers:12,} numbers   {report.perplexity:8.2f} ({ratio:.3f} of alone)")


if __name__ == "__main__":
    main()
