"""What happens around the train step, in this process."""

import json

import pytest

from configs import digits
from sra_jax import files
from sra_jax.errors import UserError
from sra_jax.training.loop import train

TINY = {
    "model.width": 32, "model.depth": 3, "model.heads": 2, "alignment.student_block": 1, "alignment.teacher_block": 2,
    "batch_size": 16, "optimizer.warmup_steps": 0, "log_every": 1, "sample_every": 0, "ema.decay": 0.8, "steps": 4,
    "checkpoint_every": 2,
}  # fmt: skip


def recipe(**changes):
    config = digits.get_config()
    config.update_from_flattened_dict(TINY | changes)
    return config


def test_a_workdir_is_one_run_s_at_a_time(tmp_path):
    with files.locked(tmp_path, ""), pytest.raises(UserError, match=r"written by process .*choose another --workdir"):
        train(recipe(), tmp_path)
    assert list(tmp_path.iterdir()) == []
    train(recipe(), tmp_path)
    assert not (tmp_path / ".lock").exists()
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 4
