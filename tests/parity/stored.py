"""What a set of golden numbers holds: sets of one format differ in sizes, in the blocks that are kept, and in runs."""

import re
from collections.abc import Mapping

import numpy as np
import pytest


def blocks(arrays: Mapping[str, np.ndarray], name: str) -> dict[int, np.ndarray]:
    """Block number -> array of those that are stored under `name`, a pattern such as `fwd/block_#`, ascending."""
    pattern = re.compile(re.escape(name).replace(r"\#", r"(\d+)"))
    found = {int(match[1]): array for key, array in arrays.items() if (match := pattern.fullmatch(key))}
    assert found, f"no array is called {name}"
    return dict(sorted(found.items()))


def require(arrays: Mapping[str, np.ndarray], *names: str) -> None:
    """Skip the test where the set lacks one of these arrays."""
    if missing := [name for name in names if name not in arrays]:
        pytest.skip(f"this set has no {', '.join(missing)}")
