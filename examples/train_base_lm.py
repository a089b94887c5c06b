"""Train a small language model from nothing on any text, and save it as a transformers folder.

python examples/train_base_lm.py models/mine train.txt --valid valid.txt
python examples/train_base_lm.py models/mine wikitext --config wikitext-2-raw-v1   # of the Hub
python examples/train_base_lm.py models/mine train.txt --arch llama --layers 8 --width 512

The tokenizer (byte-level BPE) is trained on the same text. Training stops where the validation loss
does; a killed run continues when it is run again. knnlm study run models/mine … goes on from there.
"""

import argparse
import hashlib
import json
import math
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from knnlm_hf.corpus import documents
from knnlm_hf.demo.train import train_tokenizer
from knnlm_hf.errors import KNNLMError, first_line
from knnlm_hf.memory.checkpoint import remove_checkpoint
from knnlm_hf.study.lm_recipe import LMRecipe
from knnlm_hf.study.lm_training import mean_loss, stream, train_lm
from knnlm_hf.study.workspace import read_json, write_json


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("out", type=Path, help="folder of the model")
    add("corpus", help="text file, or id of a dataset with a 'text' column")
    add("--config", help="configuration of the dataset")
    add("--valid", help="text file for early stopping; default: the dataset's validation split")
    add("--arch", choices=("gpt2", "llama"), default="gpt2")
    add("--layers", type=int, default=4)
    add("--width", type=int, default=256)
    add("--heads", type=int, default=8)
    add("--window", type=int, default=256, help="longest context")
    add("--vocab", type=int, default=8192, help="tokens of the tokenizer")
    add("--dropout", type=float, default=0.1)
    add("--epochs", type=int, default=20)
    add("--lr", type=float, default=1e-3)
    add("--batch-size", type=int, default=16, help="windows per step")
    add("--weight-decay", type=float, default=0.1)
    add("--patience", type=int, default=3, help="epochs without a better validation loss")
    add("--seed", type=int, default=0)
    return parser.parse_args()


def texts(args: argparse.Namespace, split: str) -> list[str]:
    """The documents of a split: a text file is one, a row of a dataset is one."""
    source = args.corpus if split == "train" else args.valid
    if source is None and Path(args.corpus).is_file():
        raise KNNLMError("--valid is missing: early stopping needs a text of its own")
    try:
        if source is not None and (split != "train" or Path(source).is_file()):
            return [Path(source).read_text(encoding="utf-8")]
        from datasets import load_dataset

        rows = load_dataset(args.corpus, args.config, split=split)["text"]
    except Exception as error:  # whatever datasets raises for what is no dataset
        raise KNNLMError(
            f"{source or args.corpus}: expected a text file in UTF-8, or for the corpus a dataset "
            f"with a 'text' column: {first_line(error)}"
        ) from error
    return [text for text in rows if text.strip()]


def tokenizer_of(train: list[str], args: argparse.Namespace):
    """A tokenizer of this text and size; that of the run which this one continues, if it is.

    Raises:
        KNNLMError: the folder has one of another text or size.
    """
    record = args.out / "tokenizer_of.json"
    texts_digest = hashlib.sha256("\0".join(train).encode()).hexdigest()
    wanted = {"texts": texts_digest, "vocab": args.vocab}
    if (args.out / "tokenizer.json").is_file():
        if read_json(record) != wanted:
            raise KNNLMError(
                f"{args.out}: its tokenizer was not trained on this text with --vocab "
                f"{args.vocab}: give the same as before, or another folder"
            )
        return AutoTokenizer.from_pretrained(args.out)
    tokenizer = train_tokenizer(train, args.vocab)
    tokenizer.model_max_length = args.window
    write_json(record, wanted)  # before: killed between the two, both are made again
    tokenizer.save_pretrained(args.out)
    return tokenizer


def new_model(args: argparse.Namespace, tokenizer):
    """A model with random weights."""
    torch.manual_seed(args.seed)
    shared = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id,
              "eos_token_id": tokenizer.eos_token_id}  # fmt: skip
    if args.arch == "llama":
        return LlamaForCausalLM(LlamaConfig(
            hidden_size=args.width, intermediate_size=args.width * 8 // 3,
            num_hidden_layers=args.layers, num_attention_heads=args.heads,
            max_position_embeddings=args.window, attention_dropout=args.dropout,
            tie_word_embeddings=True, **shared,
        ))  # fmt: skip
    return GPT2LMHeadModel(GPT2Config(
        n_embd=args.width, n_layer=args.layers, n_head=args.heads, n_positions=args.window,
        embd_pdrop=args.dropout, resid_pdrop=args.dropout, attn_pdrop=args.dropout, **shared,
    ))  # fmt: skip


def tokens(corpus: list[str], tokenizer) -> torch.Tensor:
    """All documents in one stream, an end of text after each where there are several."""
    parts = []
    for piece in documents(corpus, tokenizer):
        parts.append(piece.tokens)
        if len(corpus) > 1 and not piece.more:
            parts.append([tokenizer.eos_token_id])
    return stream(parts)


def main() -> None:
    args = options()
    train, valid = texts(args, "train"), texts(args, "validation")
    tokenizer = tokenizer_of(train, args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = new_model(args, tokenizer).to(device)
    train_N, valid_N = tokens(train, tokenizer), tokens(valid, tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}, "
          f"{len(train_N):,} tokens")  # fmt: skip
    has_bf16 = device == "cuda" and torch.cuda.is_bf16_supported()
    recipe = LMRecipe(
        epochs=args.epochs, lr=args.lr, batch_size=args.batch_size, seed=args.seed,
        weight_decay=args.weight_decay, patience=args.patience,
        dtype="bfloat16" if has_bf16 else "float32",
    )  # fmt: skip
    done = train_lm(
        model, train_N, valid_N, recipe, window=args.window, checkpoint=args.out / "checkpoint"
    )
    model.save_pretrained(args.out)
    reached = math.exp(mean_loss(model, valid_N, window=args.window))
    facts = done.to_dict() | {"valid_perplexity": reached, "parameters": model.num_parameters()}
    remove_checkpoint(args.out / "checkpoint")
    (args.out / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(f"{args.out}: validation perplexity {reached:.2f} per token after {done.steps:,} "
          f"steps")  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except KNNLMError as error:
        raise SystemExit(f"error: {error}") from None
