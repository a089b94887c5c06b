"""The main job in one file: wrap a model, build a datastore, tune, evaluate, generate, explain.

python examples/quickstart.py                                    # no download: a small model
python examples/quickstart.py --model gpt2 --corpus mine.txt     # yours
"""

import argparse

from knnlm_hf.demo import run

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", help="folder or Hub id of a causal model")
parser.add_argument("--corpus", help="text file of your domain")
parser.add_argument("--out", default="stores/quickstart")
args = parser.parse_args()
run(args.out, model=args.model, corpus=args.corpus)
