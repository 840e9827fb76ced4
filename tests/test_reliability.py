"""docs/reliability.md: every promise names a test that exists and that `-m faults` runs."""

import ast
import re

import pytest

from tests.conftest import ROOT

PAGE = ROOT / "docs" / "reliability.md"
ROW = re.compile(r"^\| (?!what fails|---)(.+?) \| (.+?) \| `(tests/[\w/]+\.py)::(\w+)` \|$", re.MULTILINE)


def is_faults(node):
    """Whether a decorator, or a list of them, is `pytest.mark.faults`."""
    return any(isinstance(part, ast.Attribute) and part.attr == "faults" for part in ast.walk(node))


def marked(path):
    """Name -> whether it is marked, of all tests of a file."""
    tree = ast.parse(path.read_text())
    whole = any(
        isinstance(node, ast.Assign) and node.targets[0].id == "pytestmark" and is_faults(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    )
    return {
        node.name: whole or any(is_faults(decorator) for decorator in node.decorator_list)
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.fast
def test_every_promise_has_its_test():
    text = PAGE.read_text()
    rows = ROW.findall(text)
    assert len(rows) == sum(line.startswith("| ") for line in text.splitlines()) - 2 >= 20  # none is written otherwise
    wrong = [f"{file}::{name}" for _, _, file, name in rows if not marked(ROOT / file).get(name)]
    assert not wrong, "no such test, or not marked faults: " + ", ".join(wrong)
