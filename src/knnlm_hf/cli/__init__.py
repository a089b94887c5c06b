"""The `knnlm` command."""

from knnlm_hf.cli.commands import app


def main() -> None:
    """Entry point of the `knnlm` command."""
    app()


__all__ = ["app", "main"]
