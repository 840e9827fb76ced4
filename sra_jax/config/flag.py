"""The flag --config: a recipe, and every key of it as a flag --config.KEY."""

import difflib
import importlib.util
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from sra_jax import remote, values
from sra_jax.config.keys import flatten
from sra_jax.config.objects import method_names
from sra_jax.errors import UserError
from sra_jax.methods.registry import METHODS, NONE

flags.disclaim_key_flags()

NAME = "config"
PROJECT = Path(__file__).resolve().parents[2]
RECIPE = "a recipe is a Python file whose get_config() returns a config, such as configs/digits.py"
ENTRY = "get_config"


def define_flag(help_string: str, flag_values: flags.FlagValues = flags.FLAGS) -> flags.FlagHolder[ConfigDict | None]:
    """Define --config; its value is the recipe with the overrides that follow it on the command line, or None."""
    return flags.DEFINE_flag(_RecipeFlag(help_string, flag_values), flag_values)


def load(text: str) -> ConfigDict:
    """The recipe FILE or FILE:VARIANT, anew.

    A path that starts with `configs/` is looked for in the project, too, so that its recipes work from any folder.

    Raises:
      UserError: no such file, not a recipe, or a recipe that fails: what, and at which of its lines.
    """
    given = f"--{NAME}={text}"
    name, colon, variant = text.partition(":")
    if remote.is_address(text):
        values.path(f"--{NAME}", text, local=True)
    path = Path(values.path(f"--{NAME}", name, local=True))
    if not path.exists() and path.parts[0] == "configs":
        path = PROJECT / path
    if path.is_dir():
        raise UserError(f"{given} is a folder: {RECIPE}")
    if not path.exists():
        raise UserError(f"{given}: there is no such file; {RECIPE}{_near(path)}")
    if not path.is_file() or path.suffix != ".py":
        raise UserError(f"{given} is no Python file: {RECIPE}")
    try:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None  # a file that ends in .py has both
        recipe = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(recipe)
        make = getattr(recipe, ENTRY, None)
        if not callable(make):
            raise UserError(f"{given} defines no {ENTRY}(): {RECIPE}")
        config = make(variant) if colon else make()
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever a recipe does, it is the recipe's fault
        raise UserError(f"{given}: {_reason(error, path)}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"{given}: its {ENTRY}() returns a {type(config).__name__}, not a ConfigDict; {RECIPE}")
    return config


def _near(path: Path) -> str:
    recipes = sorted(file.stem for file in (PROJECT / "configs").glob("*.py") if file.stem != "common")
    close = difflib.get_close_matches(path.stem, recipes, n=1)
    return f". Did you mean configs/{close[0]}.py?" if close else f". There are: {', '.join(recipes)}"


def _reason(error: BaseException, path: Path) -> str:
    """What went wrong in a recipe, in one line; where, unless the recipe itself refuses its variant."""
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, SyntaxError):
        return f"it is not Python: {error.msg} at line {error.lineno}"
    if isinstance(error, OSError) and error.filename == str(path):
        return f"it cannot be read ({error.strerror})"
    if isinstance(error, ValueError):
        return message
    lines, trace = [], error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    where = f" at line {lines[-1]}" if lines else ""
    return f"the recipe fails{where}: {type(error).__name__}: {message}"


def given(flag_values: flags.FlagValues = flags.FLAGS) -> tuple[str, dict[str, Any]]:
    """What --config names, FILE or FILE:VARIANT, and the keys that the command line changes, with their values.

    Raises:
      UserError: there is no --config.
    """
    recipe = flag_values[NAME]
    if not isinstance(recipe, _RecipeFlag) or recipe.value is None:
        raise UserError(f"--{NAME} is missing: name a recipe, such as --{NAME}=configs/digits.py")
    changed = {key: flag_values[f"{NAME}.{key}"] for key, _ in flatten(recipe.value)}
    return recipe.given, {key: flag.value for key, flag in changed.items() if flag.present}


def change(config: ConfigDict, key: str, value: Any) -> None:
    """Put a value into a config under its dotted key."""
    *groups, last = key.split(".")
    group = config
    for name in groups:
        group = group[name]
    group[last] = value


def read(key: str, text: str, current: Any) -> Any:
    """A key's value from the command line, of the type that it has in the recipe.

    Raises:
      UserError: the text is no such value.
    """
    name = f"--{NAME}.{key}"
    if isinstance(current, bool):
        choice = {"true": True, "1": True, "false": False, "0": False}.get(text.strip().lower())
        if choice is None:
            raise UserError(f"{name}={values.shown(text)} must be true or false")
        return choice
    if isinstance(current, int):
        return values.whole(name, text)
    if isinstance(current, float):
        return values.number(name, text)
    if isinstance(current, tuple):
        return _numbers(text)
    return text


def _numbers(text: str) -> tuple[Any, ...]:
    """The numbers of `0,0.7`, `(0, 0.7)` or `[0,0.7]`; what is none stays text, for the check that knows the key."""
    text = text.strip()
    if text[:1] + text[-1:] in ("()", "[]"):
        text = text[1:-1]

    def item(part: str) -> Any:
        if values.INTEGER.fullmatch(part) and len(part) <= values.SHOWN:
            return int(part)
        return float(part) if values.REAL.fullmatch(part) else part

    return tuple(item(part.strip()) for part in text.removesuffix(",").split(","))


def check_read(config: ConfigDict, flag_values: flags.FlagValues) -> None:
    """Raises a `UserError` for a key on the command line that nothing reads: of a method that is not named.

    SRA's keys are left alone: recipes had them before there were other methods.
    """
    named = method_names(config)
    for name in METHODS:
        for key, _ in flatten(config.method.get(name, ConfigDict())):
            flag = f"{NAME}.method.{name}.{key}"
            if name not in named and flag in flag_values and flag_values[flag].present:
                raise UserError(
                    f"--{flag} is read by nothing with method.name={'+'.join(named) or NONE!r}: name {name} in "
                    f"--{NAME}.method.name, or leave the flag out"
                )


class _RecipeFlag(flags.Flag):
    """--config itself."""

    def __init__(self, help_string: str, flag_values: flags.FlagValues):
        self._flag_values = flag_values
        self._keys: list[str] = []
        self.given = ""
        super().__init__(flags.ArgumentParser(), None, NAME, None, help_string)

    def parse(self, argument: str) -> None:
        if self.present:
            raise UserError(
                f"--{NAME} is given twice, as {self.given} and as {argument}: name one recipe, and change its values "
                f"with --{NAME}.KEY=VALUE"
            )
        self.value, self.given = load(argument), argument
        self.present += 1
        for name in self._keys:  # of the recipe before, where one process reads several command lines
            if name in self._flag_values:
                delattr(self._flag_values, name)
        self._keys = [f"{NAME}.{key}" for key, _ in flatten(self.value)]
        for key, value in flatten(self.value):
            flags.DEFINE_flag(_KeyFlag(self.value, key, isinstance(value, bool)), self._flag_values)


class _KeyFlag(flags.Flag):
    """--config.KEY, whose value is put into the config as it is read."""

    def __init__(self, config: ConfigDict, key: str, boolean: bool):
        self._config, self._key = config, key
        super().__init__(
            flags.ArgumentParser(), None, f"{NAME}.{key}", None, f"{key} of the recipe.", boolean=boolean
        )

    def parse(self, argument: str) -> None:
        current = dict(flatten(self._config))[self._key]
        self.value = read(self._key, argument, current)
        change(self._config, self._key, self.value)
        self.present += 1
