"""A run's folder: the train state, its checkpoints, the metrics log, and runs made from other runs or files."""

CONFIG = "config.json"
"""The recipe as it was run, in the run's folder."""

TREES = ("params", "ema", "opt_state")
"""The trees of every checkpoint."""

PROFILES = "profiles"
"""The tree of further EMAs, in checkpoints of runs that track some."""

CHECKSUMS = "checksums"
"""The item of a checkpoint that holds the checksums of the others."""
