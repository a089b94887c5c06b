"""The demonstration: the whole job, on text that every Python carries, with no download."""

from knnlm_hf.demo.show import run

__all__ = ["run"]
