import ast
import importlib

import pytest

from configs import digits
from sra_jax import config as config_lib
from sra_jax.errors import UserError
from tests.conftest import ROOT

RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("__init__", "common"))


def load(recipe, variant=None):
    return importlib.import_module(f"configs.{recipe}").get_config(variant)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_sound_and_says_how_to_run_it(recipe):
    config = load(recipe)
    config_lib.check(config)
    assert config.name == recipe
    assert f"--config=configs/{recipe}.py" in importlib.import_module(f"configs.{recipe}").__doc__


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name.startswith(("sit_", "dit_", "t2i_"))])
def test_smoke_variants_are_small(recipe):
    config = load(recipe, "smoke")
    config_lib.check(config)
    assert config.data.name == "synthetic"
    assert config.steps * config.batch_size * config.model.depth * config.model.width**2 < 1e8
    with pytest.raises(ValueError, match="smoke"):
        load(recipe, "smok")


def test_paper_hyperparameters():
    """Method facts: blocks, batch, rates; the late decay of the weight starts at another epoch for 512 pixels."""
    blocks = {
        "sit_b2": (3, 8), "sit_l2": (6, 16), "sit_xl2": (8, 20), "sit_xl2_512": (8, 20),
        "dit_b2": (3, 7), "dit_l2": (6, 14), "dit_xl2": (8, 16),
    }  # fmt: skip
    for recipe, (student, teacher) in blocks.items():
        config = load(recipe)
        assert (config.alignment.student_block, config.alignment.teacher_block) == (student, teacher)
        assert (config.batch_size, config.ema.decay, config.optimizer.learning_rate) == (256, 0.9999, 1e-4)
        assert (config.alignment.interval, config.alignment.beta) == ((0.0, 0.2), 0.05)
        assert config.alignment.weight == (0.2 if recipe.startswith("sit") else 0.04)
        start = 99 if recipe.endswith("512") else 149
        assert config.alignment.weight_decay_start == start * 5004
        assert config.data.image_size == (64 if recipe.endswith("512") else 32)


@pytest.mark.parametrize("recipe", RECIPES)
def test_json_round_trip(recipe):
    config = load(recipe)
    again = config_lib.from_json(config_lib.to_json(config))
    assert config_lib.to_json(again) == config_lib.to_json(config)
    assert not config_lib.differences(again, config)


def test_every_key_is_read_somewhere():
    """A key that nothing reads would be a lie: each appears as an attribute or string outside the defaults."""
    words = set()
    for path in [*(ROOT / "sra_jax").rglob("*.py"), *(ROOT / "tools").glob("*.py")]:
        tree = ast.parse(path.read_text())
        if path.name == "keys.py":
            tree.body = [
                node for node in tree.body if not (isinstance(node, ast.FunctionDef) and node.name == "default")
            ]  # fmt: skip
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                words.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                words.add(node.value)
    for key, _ in config_lib.flatten(config_lib.default()):
        assert key.split(".")[-1] in words, f"{key} is read by nothing"


def test_resume_may_change_what_moves_no_number():
    saved, given = digits.get_config(), digits.get_config()
    with given.unlocked():
        given.steps, given.log_every, given.keep, given.accumulation = 9999, 7, 9, 2
        given.sampling.steps, given.mesh.fsdp, given.model.remat, given.name = 3, 2, "none", "other"
    assert config_lib.differences(saved, given) == []


def test_resume_names_what_shapes_the_run():
    saved, given = digits.get_config(), digits.get_config()
    with given.unlocked():
        given.seed, given.model.depth, given.alignment.weight = 5, 3, 0.3
    changed = config_lib.differences(saved, given)
    assert changed == ["alignment.weight: 0.2 -> 0.3", "model.depth: 6 -> 3", "seed: 0 -> 5"]


def test_length_shapes_the_run_where_a_schedule_depends_on_it():
    saved, given = digits.get_config(), digits.get_config()
    for config in (saved, given):
        with config.unlocked():
            config.optimizer.schedule = "cosine"
    given.steps = 17
    assert config_lib.differences(saved, given) == [f"steps: {saved.steps} -> 17"]


@pytest.mark.parametrize(
    ("length", "expected"),
    [({"steps": 7}, 7), ({"epochs": 1.5}, 43), ({"examples": 1000}, 16), ({"examples": 960}, 15)],
)
def test_length_in_steps_epochs_or_examples(length, expected):
    config = digits.get_config()
    config.update({"steps": 0, **length})
    config_lib.check(config)
    assert config_lib.total_steps(config, num_examples=1797) == expected


BAD = [
    ({"alignment.teacher_block": 13}, "teacher_block=13 is beyond model.depth=6"),
    ({"alignment.student_block": 5}, "teacher_block=4 is before"),
    ({"batch_size": 63}, r"cannot be split over 8 devices; make batch_size a multiple of 8"),
    ({"accumulation": 5}, "batch_size=64 is not divisible by accumulation=5"),
    ({"accumulation": 64}, "parts of 1 cannot be split over 8 devices"),
    ({"alignment.interval": (0.5, 0.1)}, "interval"),
    ({"process.path": "cos"}, "'cos' is unknown; allowed: linear, cosine"),
    ({"process.name": "ddpm"}, "process.name='ddpm' is unknown"),
    ({"sampling.sampler": "dpm"}, "'dpm' is unknown; allowed: .*sde"),
    ({"sampling.steps": 0}, "sampling.steps=0"),
    ({"sampling.guidance_scale": 0.5}, "at least 1"),
    ({"sampling.guidance_interval": (0.0, 1.7)}, "guidance_interval"),
    ({"sampling.guidance_channels": 3}, "guidance_channels=3"),
    ({"model.patch": 3}, "image_size=8 is not divisible by model.patch=3; .*1, 2, 4, 8"),
    ({"model.heads": 5}, "width=96 must be divisible by model.heads=5"),
    ({"model.remat": "all"}, "allowed: none, gelu, dots, block"), ({"model.unroll": "true"}, "allowed: auto, yes, no"),
    ({"dtype": "float16"}, "allowed: float32, bfloat16"),
    ({"steps": 0}, "set exactly one of steps, epochs, examples"),
    ({"epochs": 2.0}, "steps and epochs"),
    ({"steps": -5}, "steps=-5"),
    ({"label_dropout": 1.0}, "label_dropout=1.0"),
    ({"ema.decay": 1.5}, "ema.decay=1.5"),
    ({"ema.schedule": "linear"}, "allowed: constant, cosine"),
    ({"optimizer.learning_rate": 0.0}, "learning_rate=0.0"),
    ({"optimizer.b2": 1.0}, "b2=1.0"),
    ({"log_every": 0}, "log_every=0 must be at least 1"),
    ({"mesh.data": 3}, "mesh.data=3, mesh.fsdp=1, mesh.model=1 does not fit 8 devices"),
    ({"mesh.fsdp": -1}, "at most one may be -1"),
    ({"model.width": 36, "model.heads": 6, "mesh.fsdp": 8}, "mesh.fsdp=8 does not divide model.width=36"),
    ({"mesh.model": 8}, "mesh.model=8 does not divide model.heads=4; use at most --config.mesh.model=4"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[next(iter(changes)) for changes, _ in BAD])
def test_impossible_values(changes, message):
    config = digits.get_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        config_lib.check(config, device_count=8)


def test_unknown_and_missing_keys():
    config = digits.get_config()
    with config.unlocked():
        config.alignment.wieght = 0.5
    with pytest.raises(UserError, match=r"alignment.wieght is not read.*did you mean alignment.weight"):
        config_lib.check(config)
    config = digits.get_config()
    with config.unlocked():
        del config.ema["decay"]
    with pytest.raises(UserError, match=r"ema.decay is missing"):
        config_lib.check(config)
