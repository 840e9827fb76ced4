"""Commands in README, docs and docstrings: found, taken apart, and parsed by the commands' own flags.

As a script it loads every command of the project once, in one process: standard input is a JSON list of calls, each a
list [file, argument, ...]; standard output a JSON object with `help` (file -> flag -> exit code and text) and
`errors` (what is wrong with each call; empty: nothing).
"""

import contextlib
import dataclasses
import importlib.util
import io
import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
COMMANDS = ("main.py", *(f"tools/{path.name}" for path in sorted((ROOT / "tools").glob("*.py"))))
RECIPES = tuple(f"configs/{path.name}" for path in sorted((ROOT / "configs").glob("*.py")) if path.stem != "common")
PROGRAMS = (
    "#SBATCH", ".", ".ci/run", "[", "apt-get", "args:", "bash", "cat", "cd", "cp", "curl", "docker", "echo", "export",
    "for", "gcloud", "git", "gsutil", "kubectl", "ls", "mkdir", "mpirun", "mypy", "pip", "pre-commit", "pytest",
    "python", "python3", "ruff", "sbatch", "scontrol", "srun", "tar", "ulimit", "unzip", "wget",
)  # fmt: skip
"""First words by which a line of a code block is known to be a command."""


@dataclasses.dataclass(frozen=True)
class Documented:
    """A command line as a page has it, without the remark after it and with its continuation lines joined."""

    page: str
    line: int
    text: str


def code_lines(text: str) -> Iterator[tuple[int, str]]:
    """(number, line) of the code blocks of a Markdown page: fenced, or indented after a blank line or a title."""
    fenced = inside = False
    before = ""  # the line above
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced:
            yield number, line
        elif line.startswith("    ") and (inside or not before.strip() or before.startswith("#")):
            inside = True
            yield number, line[4:]
        elif line.strip():
            inside = False
        before = line


def commands(page: str, lines: Iterable[tuple[int, str]]) -> Iterator[Documented]:
    """The commands among lines; those that end in a backslash, or open a YAML list, go on in the next."""
    start, held = 0, ""
    for number, line in lines:
        start, held = (start, f"{held} {line.strip()}") if held else (number, line.strip())
        if held.endswith("\\"):
            held = held[:-1].rstrip()
        elif not held.startswith("args: [") or held.endswith("]"):
            text = held if held.startswith("#SBATCH") else re.split(r"\s+#\s", held)[0].rstrip()
            if text.split(" ")[0] in PROGRAMS:
                yield Documented(page, start, text)
            held = ""


def of_page(page: str) -> list[Documented]:
    """The commands of a page: in code blocks, and of the kind `python tools/fid.py --workdir=W` in sentences."""
    text = (ROOT / page).read_text()
    blocks = dict(code_lines(text))
    spans = [
        Documented(page, number, span)
        for number, line in enumerate(text.splitlines(), 1) if number not in blocks
        for span in re.findall(r"`(python \S+\.py [^`]+)`", line)
    ]  # fmt: skip
    return [*commands(page, blocks.items()), *spans]


def of_docstring(file: str) -> list[Documented]:
    """The examples in the docstring of a recipe or a command."""
    source = (ROOT / file).read_text()
    docstring = source[3 : source.index('"""', 3)].replace("\\\\", "\\")
    lines = [(number, line) for number, line in enumerate(docstring.splitlines(), 1) if line.startswith("    ")]
    return [command for command in commands(file, lines) if command.text.startswith("python ")]


def calls(text: str) -> list[list[str]]:
    """The calls of this project's commands in a command line, as [file, argument, ...]."""
    if text.startswith("args: ["):
        text = text.removeprefix("args: [").removesuffix("]").replace(",  ", ", ").replace(", ", " ")
    found = []
    for part in text.replace("'", " ; ").replace('"', " ; ").replace("&&", " ; ").split(" ; "):
        words = shlex.split(part)
        if "python" in words and (call := words[words.index("python") + 1 :]) and call[0].endswith(".py"):
            found.append([word for word in call if word != "..."])
    return found


def error_of(call: list[str]) -> str:
    """What the command's own flags, and the checks of a recipe, have against a call."""
    from absl import flags

    from sra_jax import config as config_lib

    file, *arguments = (re.sub(r"\$\(\w+\)", "0", word) for word in call)  # what Kubernetes puts in
    if not (ROOT / file).exists():
        return f"there is no {file}"
    known = set(flags.FLAGS)
    try:
        spec = importlib.util.spec_from_file_location(f"documented_{Path(file).stem}", ROOT / file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if file == "tools/benchmark.py":
            measured = arguments.pop(0)
            if measured not in module.COMMANDS:
                return f"{measured} is none of {module.COMMANDS}"
            homes = {"data": module.data, "vae": module.data, "inception": module.evaluation,
                     "metrics": module.evaluation}  # fmt: skip
            homes.get(measured, module).define_flags()
        sys.argv = [file, *arguments]  # where the flag of a recipe looks for its overrides
        left = flags.FLAGS(sys.argv)
        if len(left) > 1:
            return f"{left[1]} is no flag"
        if "config" in flags.FLAGS and flags.FLAGS.config is not None:
            config = config_lib.from_flag(flags.FLAGS.config)
            config_lib.check(config, config_lib.fewest_devices(config))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        for name in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, name)
    return ""


def help_of(file: str, flag: str) -> tuple[int, str]:
    """Exit code and text of `python FILE FLAG`, for any of the flags that ask for help."""
    from absl import flags

    known, sys.argv = set(flags.FLAGS), [str(ROOT / file), flag]
    code, shown = -1, io.StringIO()
    with contextlib.redirect_stdout(shown):
        try:
            runpy.run_path(str(ROOT / file), run_name="__main__")
        except SystemExit as end:
            code = int(end.code or 0)
    for name in set(flags.FLAGS) - known:
        delattr(flags.FLAGS, name)
    return code, shown.getvalue()


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    asked = json.load(sys.stdin)
    helps = {file: {flag: help_of(file, flag) for flag in ("--help", "--helpshort", "--helpfull")} for file in COMMANDS}
    print(json.dumps({"help": helps, "errors": [error_of(call) for call in asked]}))
