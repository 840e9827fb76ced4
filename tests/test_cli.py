"""What every command does with its command line."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from sra_jax import cli, values
from sra_jax import config as config_lib
from sra_jax.errors import UserError
from tests.conftest import ROOT, run
from tests.in_process import call, flags_of

TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))
TEXTS = {
    "labels", "sampler", "sampling_steps", "guidance_interval", "names", "blocks", "levels", "metrics", "topology",
    "recipes", "parts", "tasks", "coordinator_address", "methods", "ema", "prompt", "prompts", "attention", "remat",
    "seeds", "measure_at", "probe_levels", "shard", "vary",
    "guidance_scales", "guidance_intervals", "emas", "steps", "name", "topologies",
}  # fmt: skip
"""Flags of text that is neither a path nor a number; their commands read them."""

TEXT_KINDS = ("DEFINE_string", "DEFINE_list", "DEFINE_multi_string")

LOCAL = {
    ("compile_tpu", "results"), ("fid", "data_dir"), ("linear_probe", "cache"), ("prepare_latents", "data_dir"),
    ("prepare_latents", "features"), ("prepare_latents", "output"), ("study", "output"),
    ("compare", "workdir"), ("compare", "curve"), ("compare", "output"), ("compare", "make"), ("sweep", "workdir"),
    ("sweep", "output"), ("sweep", "data_dir"),
}  # fmt: skip
"""Flags of paths that cannot be addresses."""


def defined():
    """(file, kind of definition, name of the flag) of every flag that is defined with absl's own functions."""
    for path in [ROOT / "main.py", *(ROOT / "tools").glob("*.py"), *(ROOT / "sra_jax").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            function = node.func if isinstance(node, ast.Call) else None
            if isinstance(function, ast.Attribute) and function.attr.startswith("DEFINE_"):
                yield path.name, function.attr, getattr(node.args[0], "value", None)


def test_numbers_and_paths_are_read_in_one_way():
    """absl's own flags take nan, digits of other scripts, addresses; those of sra_jax.cli do not."""
    kinds = {kind for _, kind, _ in defined()}
    assert kinds == {"DEFINE_bool", "DEFINE_enum", "DEFINE_flag", *TEXT_KINDS}
    texts = {(file, name) for file, kind, name in defined() if kind in TEXT_KINDS}
    assert {name for _, name in texts} <= TEXTS, sorted(texts)


def path_flags():
    for tool in TOOLS:
        for name, flag in flags_of(tool).items():
            if isinstance(flag.parser, (cli.PathParser, cli.PathsParser, cli.SourceParser)):
                yield tool, name


@pytest.mark.faults
def test_every_path_flag_refuses_an_address_that_it_cannot_read_before_anything_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = set(path_flags())
    assert len(found) > 25
    for tool, name in found:
        for scheme in ("ftp", "gs")[: 2 if (tool, name) in LOCAL else 1]:
            done = call(tool, f"--{name}={scheme}://b/x", code=2)
            assert done.stderr.startswith(f"error: --{name}={scheme}://b/x is an address ({scheme}://)"), (tool, done)
            assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.faults
def test_every_number_flag_has_a_range():
    for tool in TOOLS:
        for name, flag in flags_of(tool).items():
            if not isinstance(flag.parser, (cli.WholeParser, cli.NumberParser)):
                continue
            for text in ("nan", "inf", "1e400", "1" + 40 * "0", "-1" + 40 * "0", "٣", "--5", "", "x"):
                with pytest.raises(UserError, match=rf"^--{name}=.* must be .*at least|^--{name}=.* must be .*above"):
                    flag.parser.parse(text)
            if name == "seed":
                assert flag.parser.parse("3000000000") == 3_000_000_000
                assert flag.parser.parse(str(values.SEED_LIMIT)) == values.SEED_LIMIT
                with pytest.raises(UserError, match="--seed=4294967296 must be at least 0 and at most 4,294,967,295"):
                    flag.parser.parse("4294967296")


def ended(capsys, arguments, main=lambda: 0):
    """Exit code and stderr of a command that knows --config, --path and --count."""
    holders = [
        config_lib.define_flag("The recipe."), cli.path_flag("path", None, "A path."),
        cli.whole_flag("count", 1, "A number.", 1, 9),
    ]  # fmt: skip
    try:
        with pytest.raises(SystemExit) as end:
            cli.run(main, ["command", *arguments])
        return end.value.code, capsys.readouterr().err
    finally:
        for name in [name for name in flags.FLAGS if name.startswith("config.")] + [holder.name for holder in holders]:
            flags.FLAGS[name].unparse()
            delattr(flags.FLAGS, name)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cout=3",), "Unknown flag 'cout'. Did you mean: count"),
        (("--count=10",), "--count=10 must be at least 1 and at most 9"),
        (("--count",), "Missing value for flag --count"),
        (("--path=",), "--path= is empty"),
        (("--path=~nobody-of-that-name/x",), "home of a user who is not known"),
        (("--config.steps=3",), "--config.steps changes a value of a recipe: name the recipe with --config=FILE"),
        (("--config.steps=3", "--config=configs/digits.py"), "--config.steps stands before --config=FILE"),
        (("--config=configs/digits.py", "--config.stepz=3"), "--config has no key stepz. Did you mean --config.steps"),
        (("--config=configs/digits.py", "--config.alignment=3"), "--config.alignment is a group of keys"),
        (("--flagfile=no/such/file",), "no/such/file"),
        (("stray",), "unexpected argument 'stray'"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments, message, capsys):
    code, errors = ended(capsys, arguments)
    assert code == 2
    assert errors.startswith("error: ")
    assert message in errors
    assert len(errors.splitlines()) == 1


@pytest.mark.faults
def test_flags_from_a_file_with_a_recipe(tmp_path, capsys):
    file = tmp_path / "flags"
    file.write_text("--config=configs/digits.py\n--config.steps=5\n--count=3\n")
    seen = []

    def main():
        seen.append((flags.FLAGS.config.steps, flags.FLAGS.count))

    assert ended(capsys, [f"--flagfile={file}", "--config.steps=7"], main) == (0, "")
    assert seen == [(7, 3)]


@pytest.mark.faults
@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a GPU")
def test_a_platform_that_is_not_there_is_one_line(tmp_path):
    """JAX itself ends in an assertion without a message. Nor do TensorFlow and gRPC say anything at the start."""
    done = run("main.py", "--config=configs/digits.py", f"--workdir={tmp_path / 'run'}", code=2, fresh=True,
               environment={"JAX_PLATFORMS": "cuda"})  # fmt: skip
    assert done.stderr.startswith("error: JAX_PLATFORMS=cuda finds no device to compute on")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.faults
def test_tensorflow_is_loaded_without_a_word():
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TF_", "GRPC_"))}
    program = "import sra_jax, tensorflow as tf; print(int(tf.constant(1) + 1))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("2\n", "")
