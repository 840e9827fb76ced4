"""Numbers that a recipe may hold."""

import math

import pytest

from configs import digits
from sra_jax import config as config_lib
from sra_jax import values
from sra_jax.config.keys import CAPTION_KEYS
from sra_jax.config.limits import LOCAL_PATHS, PATHS, RANGES, check_number, check_workers
from sra_jax.diffusion.registry import PROCESSES, SAMPLERS, process_defaults
from sra_jax.errors import UserError

NAMES = {
    "log.wandb",
    "name", "dtype", "data.name", "model.attention", "model.name", "model.initialisation", "model.remat",
    "model.products", "model.unroll",
    "alignment.distance",
    "alignment.weight_schedule", "data.captions", "process.name",
    "optimizer.schedule", "ema.schedule", "ema.profiles", "ema.sampled", "sampling.sampler", "evaluation.extractor",
    "process.path", "process.time_distribution", "process.schedule", "process.variance",
}  # fmt: skip
"""Keys of text that is one of a few words."""


def all_keys():
    """Every key there is, with its default."""
    known = dict(config_lib.flatten(config_lib.default()))
    for name in PROCESSES:
        known |= {f"process.{key}": value for key, value in process_defaults(name).items()}
    for sampler in SAMPLERS.values():
        known |= {f"sampling.{key}": value for key, value in sampler.options.items()}
    return known | {key: value for key, (value, _) in CAPTION_KEYS.items()}


def test_every_number_has_a_range_and_every_text_is_a_name_or_a_path():
    known = {key: value for key, value in all_keys().items() if not key.startswith("method.")}
    numbers = {key for key, value in known.items() if isinstance(value, (int, float)) and not isinstance(value, bool)}
    assert numbers == set(RANGES)
    assert {key for key, value in known.items() if isinstance(value, str)} == NAMES | set(PATHS) | set(LOCAL_PATHS)
    for key in numbers:
        assert isinstance(RANGES[key].low, type(known[key])), f"{key}: ends of the range are of the key's type"
        if known[key] or key not in ("steps", "epochs", "examples"):
            check_number(key, known[key], RANGES[key])


@pytest.mark.faults
@pytest.mark.parametrize("key", RANGES)
def test_ranges(key):
    allowed = RANGES[key]
    whole = isinstance(allowed.low, int)
    step = 1 if whole else 1e-3
    wrong = [math.nan, math.inf, -math.inf, 10**400, -(10**400), None, True, "half", "٣"] + [1.5] * whole
    for end, is_open, beyond in (
        (allowed.low, allowed.open_low, allowed.low - step),
        (allowed.high, allowed.open_high, allowed.high + step if whole else allowed.high * 1.001),
    ):
        wrong += [beyond, end] if is_open else [beyond]
        if not is_open:
            check_number(key, end, allowed)
    for value in wrong:
        with pytest.raises(UserError, match=rf"^{key}=.* must be ") as caught:
            check_number(key, value, allowed)
        assert "\n" not in str(caught.value)


SENSELESS = [
    ({"steps": 0, "epochs": math.inf}, "epochs=inf must be a finite number"),
    ({"steps": 0, "examples": 10**15, "batch_size": 8}, r"the run would take 1.25e\+14 steps: at most 1,000,000,000"),
    ({"optimizer.learning_rate": math.inf}, "learning_rate=inf must be a finite number"),
    ({"optimizer.weight_decay": math.inf}, "weight_decay=inf must be a finite number"),
    ({"optimizer.warmup_steps": 2**31}, "warmup_steps=2147483648 must be at least 0 and at most 1,000,000,000"),
    ({"model.mlp_ratio": math.nan}, "mlp_ratio=nan must be a finite number"),
    ({"model.mlp_ratio": 0.01}, "mlp_ratio=0.01 must be at least 0.125"),
    ({"model.width": 4, "model.heads": 1, "model.mlp_ratio": 0.125}, "leaves the MLP no width"),
    ({"batch_size": 10**12}, "batch_size=1000000000000 must be at least 1 and at most 16,777,216"),
    ({"sampling.preview_per_class": 10**9}, "preview_per_class=1000000000 must be at least 1"),
    ({"sampling.preview_per_class": 5000}, "preview_per_class=5000 are 50,000 images at once: at most 10,000"),
    ({"sampling.guidance_scale": 1e30}, r"guidance_scale=1e\+30 must be at least 1 and at most 1000"),
    ({"data.workers": 500}, "data.workers=500 must be at least 0 and at most 256"),
    ({"seed": 2**32}, "seed=4294967296 must be at least 0 and at most 4,294,967,295"),
    ({"alignment.weight": math.inf}, "alignment.weight=inf must be a finite number"),
]


@pytest.mark.faults
@pytest.mark.parametrize(("changes", "message"), SENSELESS, ids=[list(changes)[-1] for changes, _ in SENSELESS])
def test_senseless_numbers(changes, message):
    config = digits.get_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        config_lib.check(config)
        config_lib.total_steps(config, num_examples=1797)


@pytest.mark.faults
def test_workers_beyond_the_machine():
    check_workers(8, cores=2)
    check_workers(64, cores=16)
    with pytest.raises(UserError, match=r"data.workers=40 would start 40 processes on 2 cores: at most 8 here"):
        check_workers(40, cores=2)


@pytest.mark.faults
def test_guidance_needs_a_null_label_that_was_trained():
    config = digits.get_config()
    assert config.sampling.guidance_scale > 1
    config.label_dropout = 0.0
    with pytest.raises(UserError, match=r"guidance_scale=1.5 needs a null label that was trained.*label_dropout=0.1"):
        config_lib.check(config)
    config.sampling.guidance_scale = 1.0
    config_lib.check(config)


def test_seeds_are_those_that_random_keys_tell_apart():
    import jax
    import numpy as np

    seeds = (0, 1, 3_000_000_000, values.SEED_LIMIT)
    bits = [tuple(np.asarray(jax.random.key_data(jax.random.key(seed)))) for seed in seeds]
    assert len(set(bits)) == len(seeds)
    traced = jax.jit(lambda seed: jax.random.key_data(jax.random.key(seed)))
    for seed, expected in zip(seeds, bits, strict=True):
        assert tuple(np.asarray(traced(np.uint32(seed)))) == expected
