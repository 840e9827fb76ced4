"""Golden numbers: arrays computed with the authors' PyTorch code, in a folder outside the repository."""

import os
from pathlib import Path

import numpy as np
import pytest

GOLDENS = Path(os.environ.get("SRA_GOLDENS", Path(__file__).resolve().parents[3] / "shared" / "goldens"))


@pytest.fixture(scope="session")
def golden():
    """`golden("sit_forward")` loads sit_forward.npz; the test skips where there is no such file."""
    loaded: dict[str, dict[str, np.ndarray]] = {}

    def load(name: str) -> dict[str, np.ndarray]:
        path = GOLDENS / f"{name}.npz"
        if not path.exists():
            pytest.skip(f"no golden numbers at {path}: set SRA_GOLDENS to the folder that holds {name}.npz")
        if name not in loaded:
            with np.load(path) as arrays:
                loaded[name] = {key: arrays[key] for key in arrays.files}
        return loaded[name]

    return load
