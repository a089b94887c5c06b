"""`python -m knnlm_hf.cli` is `knnlm`."""

from knnlm_hf.cli import main

if __name__ == "__main__":
    main()
