"""The words that all rooms share, and training itself: recipes, tokens, rows, checkpoints."""

import logging

__version__ = "0.1.0"

# subtle: transformers' Trainer imports peft and with it bitsandbytes where they are installed, which on a CPU warns of
# a kernel that it would fetch from the Hub; the level must be set before the import, wherever that happens first
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
