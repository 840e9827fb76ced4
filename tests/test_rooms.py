"""The walls of the house: a room imports only rooms that come before it (docs/design.md)."""

import ast

from tests.conftest import ROOT, run

ROOMS = (
    "errors", "remote", "values", "files", "cli", "heap", "models", "distributed", "diffusion", "methods",
    "config", "interop", "data", "runs", "sampling", "evaluation", "inspection", "training", "planning", "benchmarks",
)  # fmt: skip
PACKAGE = ROOT / "sra_jax"


def imported(path):
    """(line, room) of every import of the package in a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "sra_jax":
            names = [f"sra_jax.{alias.name}" for alias in node.names]
        else:
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
        yield from ((node.lineno, name.split(".")[1]) for name in names if name.startswith("sra_jax."))


def test_every_room_has_its_place():
    assert {path.stem for path in PACKAGE.iterdir() if not path.name.startswith("__")} == set(ROOMS)


def test_a_room_imports_only_rooms_before_it():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        allowed = {room, *ROOMS[: ROOMS.index(room)]} if room in ROOMS else set()
        wrong += [f"{path}:{line} imports {other}" for line, other in imported(path) if other not in allowed]
    assert not wrong, "\n".join(wrong)


def test_a_start_loads_no_library_that_the_run_may_not_need():
    """Each of these takes every command seconds; who needs one loads it then."""
    large = {"sklearn", "tensorflow", "tensorflow_datasets", "torch", "matplotlib", "wandb", "clu"}
    done = run("-c", f"import sys, main; print({large} & set(sys.modules))")
    assert done.stdout == "set()\n"


def test_tools_and_recipes_never_reach_into_the_loop_s_insides():
    """Tools read run folders; of training they may ask for nothing but what starts a run."""
    for path in (ROOT / "tools").glob("*.py"):
        assert "training" not in {room for _, room in imported(path)}, path
