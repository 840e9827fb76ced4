"""--config and --config.KEY, as the commands read them."""

import pytest
from absl import flags

from sra_jax import config as config_lib
from sra_jax.errors import UserError
from tests.conftest import ROOT

DIGITS = "--config=configs/digits.py"


def parse(*arguments):
    """The config of a command line."""
    known = flags.FlagValues()
    flags.DEFINE_string("flagfile", "", "as absl has it", flag_values=known)
    holder = config_lib.define_flag("The recipe.", known)
    known(["command", *arguments])
    return config_lib.from_flag(holder.value, known)


def test_every_key_is_a_flag_of_its_type():
    config = parse(
        DIGITS, "--config.steps=7", "--config.epochs", "2", "--config.dtype=bfloat16", "--config.ema.decay=.5",
        "--config.alignment.interval=0.1,0.3", "--noconfig.alignment.head", "--config.alignment.enabled=false",
        "--config.sampling.guidance_interval=[0, 0.7]", "--config.init_from=",
    )  # fmt: skip
    assert (config.steps, config.epochs, config.dtype, config.ema.decay) == (7, 2.0, "bfloat16", 0.5)
    assert isinstance(config.epochs, float)
    assert config.alignment.interval == (0.1, 0.3)
    assert (config.alignment.head, config.alignment.enabled) == (False, False)
    assert config.sampling.guidance_interval == (0, 0.7)
    assert parse("--config=configs/digits.py:dit").name == "digits_dit"


@pytest.mark.fast
def test_a_key_of_a_method_that_is_not_named_is_refused():
    assert parse(DIGITS, "--config.method.name=layersync", "--config.method.layersync.weight=0.4")
    assert parse(DIGITS, "--config.alignment.weight=0.4", "--config.method.name=layersync")
    for wrong in (
        ("--config.method.layersync.weight=0.4",),
        ("--config.method.repa.hidden=4", "--config.method.name=repa_conv+sra"),
    ):
        with pytest.raises(UserError, match=r"is read by nothing with method\.name"):
            parse(DIGITS, *wrong)


@pytest.mark.faults
def test_one_number_is_a_fixed_offset_for_the_teacher():
    for text in ("0.2", "(0.2,)", "0.2,0.2"):
        config = parse(DIGITS, f"--config.alignment.interval={text}")
        config_lib.check(config)
        assert config_lib.methods_of(config).parts[0].interval == (0.2, 0.2)


SPELLINGS = (
    "0,0.3,0.7", "a", "a,b", "", "None", "nan", "inf", "nan,nan", "0,inf", "-0.1", "-0.1,0.2", "0.7,0", "0 0.7", "0.2s",
    "0%,70%", "0:0.7", "0,,1", "1e999,1", "(0,(0.1,1))",
)  # fmt: skip


@pytest.mark.faults
@pytest.mark.parametrize("key", ["alignment.interval", "sampling.guidance_interval"])
def test_what_is_no_interval_is_one_line(key):
    wrong = (*SPELLINGS, "0.2") if key.startswith("sampling") else SPELLINGS
    for text in wrong:
        with pytest.raises(UserError, match=rf"^{key}=.* must be two numbers low,high") as caught:
            config_lib.check(parse(DIGITS, f"--config.{key}={text}"))
        assert "\n" not in str(caught.value)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--config.steps=many",), r"--config.steps=many must be a whole number"),
        (("--config.steps=1e3",), r"--config.steps=1e3 must be a whole number"),
        (("--config.batch_size=٦٤",), r"--config.batch_size=٦٤ must be a whole number"),
        (("--config.ema.decay=1,0",), r"--config.ema.decay=1,0 must be a finite number"),
        (("--config.alignment.head=maybe",), r"--config.alignment.head=maybe must be true or false"),
        (("--config=configs/sit_b2.py",), r"--config is given twice, as configs/digits.py and as configs/sit_b2.py"),
        (("--config.init_from=ftp://b/run",), r"--config.init_from=ftp://b/run is an address"),
        (("--config.data.cache=gs://b/x",), r"--config.data.cache=gs://b/x is an address"),
        (("--config.data.path=imagefolder:s3://b/x",), r"--config.data.path=s3://b/x is an address"),
    ],
)
def test_wrong_values(arguments, message):
    with pytest.raises(UserError, match=message):
        parse(DIGITS, *arguments)


def test_home_is_expanded_in_every_key_that_holds_a_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = parse(
        DIGITS, "--config.data.path=idx:~/x", "--config.init_from=~/r", "--config.data.vae=~/v",
        "--config.evaluation.reference=~/s.npz", "--config.evaluation.weights=~/w",
    )  # fmt: skip
    assert (config.data.path, config.init_from, config.data.vae) == ("idx:/home/me/x", "/home/me/r", "/home/me/v")
    assert (config.evaluation.reference, config.evaluation.weights) == ("/home/me/s.npz", "/home/me/w")


@pytest.mark.faults
def test_flags_from_a_file(tmp_path):
    """The file's flags come first, the command line's after it have the last word."""
    file = tmp_path / "flags"
    file.write_text(f"{DIGITS}\n# a remark\n--config.steps=5\n--config.seed=3\n")
    config = parse(f"--flagfile={file}", "--config.steps=7")
    assert (config.steps, config.seed) == (7, 3)


def test_a_command_line_leaves_nothing_to_the_next():
    known = flags.FlagValues()
    holder = config_lib.define_flag("The recipe.", known)
    known(["command", DIGITS, "--config.steps=5"])
    known.unparse_flags()
    known(["command", "--config=configs/dit_b2.py", "--config.process.num_steps=100"])
    assert (holder.value.process.num_steps, holder.value.steps) == (100, 400_000)
    known.unparse_flags()
    known(["command", DIGITS])
    assert holder.value.steps == 2000


RECIPES = {
    "empty.py": ("", r"defines no get_config\(\): a recipe is a Python file"),
    "text.py": ("This is no recipe", r"it is not Python: .* at line 1"),
    "nul.py": ("\0", r"empty|null bytes|not Python"),
    "README.md": ("# Read me", r"is no Python file: a recipe is a Python file"),
    "name.py": ("get_config = 3", r"defines no get_config"),
    "raises.py": ("x = 1\n\ndef get_config():\n    return {}['no key']\n", r"fails at line 4: KeyError: 'no key'"),
    "imports.py": ("import no_such_module\n", r"fails at line 1: ModuleNotFoundError"),
    "exits.py": ("import sys\nsys.exit(3)\n", r"fails at line 2: SystemExit: 3"),
    "dict.py": ("def get_config():\n    return {'steps': 3}\n", r"returns a dict, not a ConfigDict"),
    "none.py": ("def get_config():\n    pass\n", r"returns a NoneType, not a ConfigDict"),
    "takes.py": ("def get_config(size):\n    pass\n", r"fails.*: TypeError: .*size"),
    "latin.py": (b"name = 'caf\xe9'\n", r"not Python"),
}


@pytest.mark.faults
@pytest.mark.parametrize("name", RECIPES)
def test_what_is_no_recipe_is_one_line(name, tmp_path):
    content, message = RECIPES[name]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        parse(f"--config={path}")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("configs", r"--config=configs is a folder: a recipe is a Python file"),
        ("configs/sit_b.py", r"no such file; .* Did you mean configs/sit_b2.py\?"),
        ("nothing.py", r"no such file; a recipe is a Python file .* There are: .*digits"),
        ("configs/digits.py:flow", r"unknown variant 'flow'; allowed: dit"),
        ("", r"--config= is empty"),
        ("gs://b/digits.py", r"is an address"),
        ("/dev/null", r"is no Python file"),
    ],
)
def test_what_is_no_file_of_a_recipe(given, message):
    with pytest.raises(UserError, match=message) as caught:
        parse(f"--config={given}")
    assert "\n" not in str(caught.value)


def test_the_project_s_recipes_are_found_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert parse(DIGITS).name == "digits"
    own = tmp_path / "configs" / "digits.py"
    own.parent.mkdir()
    own.write_text((ROOT / "configs" / "digits.py").read_text().replace('"digits"', '"mine"', 1))
    assert parse(DIGITS).name == "mine"
