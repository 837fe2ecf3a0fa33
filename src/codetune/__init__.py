"""The words that all rooms share, and training itself: recipes, tokens, rows, checkpoints."""

__version__ = "0.1.0"
