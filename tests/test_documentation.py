"""README, docs and --help say what is so: commands, flags, keys, files and links exist, and the commands are run."""

import json
import os
import re
import subprocess
import sys
import tomllib

import pytest

from sra_jax import config as config_lib
from sra_jax.config import reference
from sra_jax.config.keys import CAPTION_KEYS
from sra_jax.diffusion.registry import PROCESSES, SAMPLERS
from tests import documented
from tests.conftest import ROOT, run
from tests.test_rooms import ROOMS

LISTED = tomllib.loads((ROOT / "tests" / "commands.toml").read_text())
RUN_BY = {command: test for test, commands in LISTED["run_by"].items() for command in commands}
CANNOT_RUN = {command for commands in LISTED["cannot_run"].values() for command in commands}
ALL = {page: documented.of_page(page) for page in documented.PAGES}
LINKS = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
FILES = re.compile(r"`((?:sra_jax|tests|tools|configs|docs)/[\w/.]+?\.(?:py|md|png|txt))`")


def parts(text):
    """A line of several commands as single ones."""
    return text.split(" && ") if text.startswith("python") else [text]


@pytest.mark.fast
def test_the_commands_are_found():
    """Guards the search itself: these shapes are in the README and in docs/pods.md."""
    found = {command.text for commands in ALL.values() for command in commands}
    assert "python -m pip install -r requirements.txt && python main.py --config=configs/digits.py" in found
    assert any(text.startswith("args: [python, main.py") and text.endswith("]") for text in found)
    assert documented.calls("srun bash -c 'python main.py --config=a.py --x=1 ...'") == [
        ["main.py", "--config=a.py", "--x=1"]
    ]


@pytest.mark.fast
@pytest.mark.parametrize("page", documented.PAGES)
def test_every_command_is_run_by_a_test_or_cannot_be(page):
    unknown = [
        f"{page}:{command.line}: {part}" for command in ALL[page] for part in parts(command.text)
        if part not in RUN_BY and part not in CANNOT_RUN
    ]  # fmt: skip
    assert not unknown, "add them to tests/commands.toml:\n" + "\n".join(unknown)


@pytest.mark.fast
def test_the_lists_are_of_what_is_documented():
    parts_found = {part for commands in ALL.values() for command in commands for part in parts(command.text)}
    assert not (RUN_BY.keys() | CANNOT_RUN) - parts_found, "no page has these any more"
    assert not RUN_BY.keys() & CANNOT_RUN
    script = (ROOT / ".ci" / "run").read_text().replace(" --quiet", "")
    for command, test in RUN_BY.items():
        if test == ".ci/run":
            assert command in script, command
            continue
        file, name = test.split("::")
        source = (ROOT / file).read_text()
        assert f"def {name}(" in source, test
        tool = command.split()[1].removeprefix("tools/")
        in_process = f'call("{tool.removesuffix(".py")}"'  # tests/in_process.py
        assert tool in source or in_process in source or (tool == "main.py" and "tiny_run" in source), (command, test)


@pytest.fixture(scope="module")
def loaded():
    """Every command of the project, loaded once in one process: its --help, and what its flags say of each call."""
    pages = [command for commands in ALL.values() for command in commands]
    docstrings = [
        command for file in (*documented.COMMANDS, *documented.RECIPES) for command in documented.of_docstring(file)
    ]
    asked = [(command, call) for command in pages + docstrings for call in documented.calls(command.text)]
    done = subprocess.run(
        [sys.executable, "tests/documented.py"], cwd=ROOT, input=json.dumps([call for _, call in asked]),
        capture_output=True, text=True, check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    return result["help"], list(zip(asked, result["errors"], strict=True))


def test_flags_and_recipes_of_documented_commands_are_right(loaded):
    _, answers = loaded
    assert len(answers) > 60
    wrong = [f"{command.page}:{command.line}: {' '.join(call)}: {error}" for (command, call), error in answers if error]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("file", documented.COMMANDS)
def test_help_says_what_it_does_and_ends_with_an_example(loaded, file):
    code, text = loaded[0][file]["--help"]
    assert loaded[0][file]["--helpshort"] == [code, text]
    assert "  --flagfile" not in text
    assert "  --flagfile" in loaded[0][file]["--helpfull"][1]  # absl's own
    assert code == 0
    assert text.startswith((ROOT / file).read_text()[3:].split("\n")[0])
    what, flags, examples = re.split(r"^(?:Flags|Examples):$", text, flags=re.MULTILINE)
    assert "Exit codes: " in what or file == "tools/benchmark.py"
    assert "  --" in flags
    last = [command.text for command in documented.commands(file, enumerate(examples.splitlines()))]
    assert last[-1].startswith(f"python {file}")
    assert examples.rstrip().endswith(last[-1].split()[-1]) or "#" in examples.rstrip().splitlines()[-1]


def test_print_config():
    """Overrides are in it; nothing is made, and neither data nor a device is asked for."""
    flags = ("--config=configs/sit_b2.py", "--config.model.depth=9", "--config.mesh.fsdp=4", "--print_config")
    done = run("main.py", *flags, "--config.alignment.weight=0.5", environment={"JAX_PLATFORMS": "none_such"})
    lines = dict(line.split(" = ") for line in re.sub(" +", " ", done.stdout).splitlines() if line)
    assert lines["model.depth"] == "9 # default 12"
    assert lines["alignment.weight"] == "0.5 # default 0.2"
    assert lines["alignment.teacher_block"] == "8"
    assert lines["data.path"] == "''"
    read = {key for key, _ in config_lib.flatten(config_lib.default()) if not key.startswith("method.")}
    assert lines.keys() == {*read, "method.name"}  # the keys of methods that are not named are left out


@pytest.mark.fast
def test_the_page_of_keys_is_current():
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == reference.markdown(), "run python tools/document_config.py"


@pytest.mark.fast
@pytest.mark.parametrize("page", documented.PAGES)
def test_links_and_names_of_files_and_keys_exist(page):
    path = ROOT / page
    text = path.read_text()
    targets = [target for target in LINKS.findall(text) if "://" not in target]
    assert not [target for target in targets if not (path.parent / target).exists()]
    assert not [name for name in FILES.findall(text) if not (ROOT / name).exists()]
    keys = set(dict(config_lib.flatten(config_lib.default()))) | CAPTION_KEYS.keys()
    keys |= {f"process.{key}" for name in PROCESSES for key in config_lib.process_defaults(name)}
    keys |= {f"sampling.{key}" for sampler in SAMPLERS.values() for key in sampler.options}
    groups = {key.rpartition(".")[0] for key in keys}
    named = {key.rstrip(".") for key in re.findall(r"--config\.([a-z][\w.]*)", text)}
    assert not named - keys - groups


@pytest.mark.fast
def test_the_rooms_are_described_in_their_order():
    page = (ROOT / "docs" / "design.md").read_text().split("## Rooms")[1].split("## ")[0]
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    described = [name.removesuffix(".py") for cell in cells for name in re.findall(r"`([\w.]+)/?`", cell)]
    assert described == list(ROOMS)


@pytest.mark.fast
def test_the_readme_leads_to_every_page():
    assert not set(documented.PAGES) - {"README.md", *LINKS.findall((ROOT / "README.md").read_text())}


@pytest.mark.fast
def test_readme_fits_two_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
