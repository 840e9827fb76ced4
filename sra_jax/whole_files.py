"""Text files that appear only whole: a program that is killed while it writes leaves the old file, or none."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file, in place of one that is there; several processes may write the same one, the last remains."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.partial")
    unfinished.write_text(text)
    os.replace(unfinished, path)
