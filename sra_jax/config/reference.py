"""The page that lists every key (docs/configuration.md), made from what the code says of each.

Keys of `default()` carry their meaning as a comment on their line; those of a process are its class's attributes, those
of a sampler the arguments of its function.
"""

import ast
import dataclasses
import inspect
import textwrap
import tokenize
from collections.abc import Iterator
from io import StringIO
from typing import Any

from sra_jax.config import keys
from sra_jax.config.keys import CAPTION_KEYS, FREE_KEYS, default, flatten
from sra_jax.config.limits import RANGES
from sra_jax.diffusion.registry import PROCESSES, SAMPLERS, process_defaults
from sra_jax.methods.registry import METHODS
from sra_jax.methods.registry import defaults as method_defaults

GROUPS = {
    "": "The run",
    "data": "The training set",
    "model": "The network",
    "process": "The noise process",
    "method": "What is added to the denoising loss",
    "alignment": "Self-representation alignment, the keys of `sra`",
    "optimizer": "The optimizer: AdamW",
    "ema": "EMAs: the teacher, and what is sampled",
    "sampling": "Sampling: previews, and the defaults of the tools",
    "evaluation": "Evaluation while training",
    "mesh": "The mesh of devices",
}
"""Title of each group of keys, in the order of the page; a group without one is called by its name."""

HEAD = """# Every key of a recipe

<!-- Made by `python tools/document_config.py` from the code; do not edit. -->

A recipe ([configs/](../configs)) starts from these defaults and changes some; the command line has the last word:
`--config.model.depth=10`, `--config.alignment.interval=0,0.1`, `--config.alignment.enabled=False`. What comes out is
shown by

    python main.py --config=configs/sit_b2.py --config.model.depth=10 --print_config

A key that nothing reads is an error, and so is a value that cannot work; both end the command before any work. The last
column says whether a run that was begun may go on with another value; "length" means: as long as no schedule depends on
the length of the run.
"""


@dataclasses.dataclass(frozen=True)
class Key:
    """One row: dotted name, default and meaning."""

    name: str
    value: Any
    meaning: str


def markdown() -> str:
    """The whole page.

    Raises:
      LookupError: a key whose meaning is written nowhere.
    """
    parts = [HEAD]
    config, comments = default().to_dict(), comments_of_defaults()
    values = dict(flatten(default()))
    elsewhere = ("process.", *(f"method.{name}." for name in METHODS))  # what their classes say
    if silent := {key for key in values if not key.startswith(elsewhere)} - comments.keys():
        raise LookupError(f"{', '.join(sorted(silent))}: not in the table of sra_jax.config.keys.default()")
    groups = ["", *(name for name, value in config.items() if isinstance(value, dict))]
    for group in sorted(groups, key=lambda name: list(GROUPS).index(name) if name in GROUPS else len(GROUPS)):
        rows = [Key(key, values[key], text) for key, text in comments.items() if key.rpartition(".")[0] == group]
        parts.append(_section(f"## {GROUPS.get(group, group)}", rows))
        if group == "model":
            rows = [Key(key, value, meaning) for key, (value, meaning) in CAPTION_KEYS.items()]
            parts.append(_section("### With `model.name=mmdit`", rows))
        if group == "process":
            parts += _process_sections()
        if group == "method":
            parts += _method_sections()
        if group == "sampling":
            parts += _sampler_sections()
    return "\n".join(parts)


def _section(title: str, rows: list[Key]) -> str:
    lines = [title, "", "| key | type | default | meaning | may change |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| `{row.name}` | {_type(row)} | `{_shown(row.value)}` | {_cell(row.meaning)} | {_free(row.name)} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def _process_sections() -> Iterator[str]:
    for name, process in PROCESSES.items():
        meanings = attributes(process)
        rows = [Key(f"process.{key}", value, meanings[key]) for key, value in process_defaults(name).items()]
        yield _section(f"### With `process.name={name}`", rows)


def _method_sections() -> Iterator[str]:
    for name, method in METHODS.items():
        if not method.section:
            meanings = attributes(method)
            rows = [Key(f"method.{name}.{key}", value, meanings[key]) for key, value in method_defaults(name).items()]
            yield _section(f"### With `{name}` in `method.name`", rows)


def _sampler_sections() -> Iterator[str]:
    for name, sampler in SAMPLERS.items():
        if sampler.options:
            meanings = attributes(sampler.sample)
            rows = [Key(f"sampling.{key}", value, meanings[key]) for key, value in sampler.options.items()]
            yield _section(f"### With `sampling.sampler={name}`", rows)


def _type(row: Key) -> str:
    if isinstance(row.value, tuple):
        return "texts" if isinstance(row.value[0], str) else "numbers"
    kinds = {"str": "text", "bool": "True or False", "int": "whole number", "float": "number"}
    return ", ".join([kinds[type(row.value).__name__], *([str(RANGES[row.name])] if row.name in RANGES else [])])


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else repr(value)


def _cell(text: str) -> str:
    return text.rstrip(".").replace("|", "\\|")


def _free(key: str) -> str:
    def named(names: tuple[str, ...]) -> bool:
        return any(key == name or key.startswith(f"{name}.") for name in names)

    if key == "name":
        return "yes"
    if named(("steps", "epochs", "examples")):
        return "length"
    return "yes" if named(FREE_KEYS) else "no"


def comments_of_defaults() -> dict[str, str]:
    """Dotted key -> the comment on its line in `default()`.

    A comment that stands alone on the lines before a key belongs to it as well.

    Raises:
      LookupError: a key without one.
    """
    source = textwrap.dedent(inspect.getsource(keys.default))
    tokens = tokenize.generate_tokens(StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    code = {
        node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.expr)
    }  # lines on which an expression starts

    def meaning(line: int) -> str:
        above: list[str] = []
        while (line - 1 - len(above)) in comments and (line - 1 - len(above)) not in code:
            above.append(comments[line - 1 - len(above)])
        return " ".join([*reversed(above), *([comments[line]] if line in comments else [])])

    found: dict[str, str] = {}

    def read(node: ast.Dict, prefix: str) -> None:
        for key, value in zip(node.keys, node.values, strict=True):
            if not isinstance(key, ast.Constant):  # **defaults of a family
                continue
            name = f"{prefix}{key.value!s}"
            if isinstance(value, ast.Dict):
                read(value, f"{name}.")
            elif not (text := meaning(key.lineno)):
                raise LookupError(f"sra_jax/config/keys.py: {name} has no comment that says what it means")
            else:
                found[name] = text

    (table,) = (
        node.args[0] for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Dict)
    )  # fmt: skip
    read(table, "")
    return found


def attributes(documented: Any) -> dict[str, str]:
    """Name -> meaning from the `Attributes:` or `Args:` section of a docstring.

    Raises:
      LookupError: there is no such section.
    """
    lines = inspect.cleandoc(documented.__doc__ or "").splitlines()
    start = next((i for i, line in enumerate(lines) if line in ("Attributes:", "Args:")), None)
    if start is None:
        raise LookupError(f"{documented.__qualname__} has no Attributes: or Args: in its docstring")
    found: dict[str, str] = {}
    name = ""
    for line in lines[start + 1 :]:
        if not line.startswith("  "):
            break
        if not line.startswith("   "):
            name, _, text = line.strip().partition(": ")
            found[name] = text
        else:
            found[name] += f" {line.strip()}"
    return found
