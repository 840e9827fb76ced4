"""The tools called in this process, with a command line and an exit code: what a command's start costs is saved."""

import contextlib
import dataclasses
import functools
import importlib.util
import io
from types import ModuleType

from absl import flags

from sra_jax import cli
from tests.conftest import ROOT


@dataclasses.dataclass(frozen=True)
class Done:
    """How a tool ended, as `subprocess.CompletedProcess` says it."""

    returncode: int
    stdout: str
    stderr: str


@functools.cache
def _load(tool: str) -> tuple[ModuleType, dict[str, flags.Flag]]:
    """The tool's module and its flags, which are taken out of absl's table again: tools share names."""
    before = set(flags.FLAGS)
    spec = importlib.util.spec_from_file_location(f"tool_{tool}", ROOT / "tools" / f"{tool}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    own = {name: flags.FLAGS[name] for name in set(flags.FLAGS) - before}
    for name in own:
        delattr(flags.FLAGS, name)
    return module, own


def flags_of(tool: str) -> dict[str, flags.Flag]:
    """Name -> flag of those that the tool defines when it is loaded (benchmark.py defines none before its command)."""
    return _load(tool)[1]


def call(tool: str, *arguments: str, code: int = 0) -> Done:
    """`python tools/TOOL.py *arguments`, its exit code checked."""
    module, own = _load(tool)
    before = set(flags.FLAGS)
    out, err = io.StringIO(), io.StringIO()
    for name, flag in own.items():
        flags.FLAGS[name] = flag
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.run(module.main, [f"tools/{tool}.py", *arguments])
    except SystemExit as end:
        returned = end.code or 0
    finally:
        for name in set(flags.FLAGS) - before:
            flags.FLAGS[name].unparse()
            delattr(flags.FLAGS, name)
    done = Done(returned, out.getvalue(), err.getvalue())
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done
