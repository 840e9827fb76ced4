"""The frame around every command: flags are read, the job runs, bad input ends with one clear message.

Flags that hold numbers and paths are defined here, so that all are read in one way: `whole_flag`, `number_flag`,
`path_flag`, `paths_flag`, `source_flag`.
"""

import contextlib
import difflib
import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

from absl import app, flags, logging

from sra_jax import remote, values
from sra_jax.errors import Interrupted, Preempted, RunError, UserError

flags.disclaim_key_flags()  # they belong to the command that defines them, and stand in its --help

SYSTEM_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE,
)  # fmt: skip
"""Errors that say nothing of the program: a full or broken disk, too many open files."""

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again later
EXIT_INTERRUPTED = 130

EXAMPLES = "\nExamples:\n"
"""The line in a command's docstring from which on `--help` shows it after the flags: what is read last is at hand."""
HELP = ("--help", "-help", "--helpshort", "-h", "-?")
HELP_FULL = ("--helpfull",)


def run(main: Callable[[], int | None], argv: list[str] | None = None) -> None:
    """Parse the flags, call `main()` and exit with what it returns (None means 0).

    Args:
      main: the job; it reads `absl.flags.FLAGS`.
      argv: the command line, by default the process's own.

    `--help` shows the docstring of the command's file, its flags and, last, its examples, and exits with code 0;
    `--helpfull` shows the flags of all libraries, too. A `UserError` from `main`, an unknown flag and an unknown config
    key print their message to stderr and exit with code 2, a `RunError` with code 1, a `Preempted` with code 75, an
    `Interrupted` with code 130.
    """

    def guarded(arguments: Sequence[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.FATAL)  # libraries narrate every file they touch, and errors that they raise
            sys.excepthook = _report_of_main_thread
        try:
            if len(arguments) > 1:
                raise UserError(
                    f"unexpected argument {arguments[1]!r}: every option is a flag, --name=value (see --help)"
                )
            code = main()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            code = EXIT_BAD_INPUT
        except RunError as error:
            print(f"error: {error}", file=sys.stderr)
            code = EXIT_FAILED
        except OSError as error:
            if error.errno not in SYSTEM_ERRORS:
                raise
            print(
                f"error: {error.filename or 'a file'}: {error.strerror}. What was finished is kept; mend this and "
                "start the same command again",
                file=sys.stderr,
            )
            code = EXIT_FAILED
        except Preempted as notice:
            print(notice, file=sys.stderr)
            code = EXIT_PREEMPTED
        except Interrupted as notice:
            print(notice, file=sys.stderr)
            code = EXIT_INTERRUPTED
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            code = EXIT_INTERRUPTED
        except Exception as error:
            if remote.is_storage_error(error):
                print(f"error: the storage does not answer as it should: {remote.reason(error)}", file=sys.stderr)
            elif _at_once:
                traceback.print_exc()
            else:
                raise
            code = EXIT_FAILED
        if _at_once:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code or 0)
        sys.exit(code or 0)

    def parse(arguments: Sequence[str]) -> list[str]:
        for asked, full in ((HELP, False), (HELP_FULL, True)):
            if set(asked) & set(arguments[1:]):
                print(help_text(sys.modules["__main__"].__doc__ or "", full))
                sys.exit(0)
        try:
            return flags.FLAGS(arguments)
        except flags.UnrecognizedFlagError as error:
            message = _unknown_flag(error)
        except (flags.Error, UserError) as error:
            message = str(error)
        except OSError as error:  # --flagfile
            message = f"{error.filename} cannot be read ({error.strerror})"
        print(f"error: {message}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)

    app.run(guarded, argv=argv, flags_parser=parse)


@contextlib.contextmanager
def ends_when_told(state: str) -> Iterator[None]:
    """SIGTERM and Ctrl-C end the block as they end a training run: by `Preempted` and `Interrupted`.

    A second signal does what it did before the block. On another thread than the main one nothing changes.

    Args:
      state: what is saved, for the message.
    """
    if threading.current_thread() is not threading.main_thread():  # Python allows it nowhere else
        yield
        return
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def end(number: int, _: Any) -> None:
        restore()
        if number == signal.SIGINT:
            raise Interrupted(f"interrupted: {state}; the same command goes on from there")
        raise Preempted(f"told to make room: {state}; start the same command again")

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        restore()


def help_text(docstring: str, full: bool = False) -> str:
    """What `--help` shows: what the command does, its flags, its examples.

    Args:
      docstring: of the command's file; what follows its line "Examples:" comes after the flags.
      full: show the flags of all libraries, not only the project's own.
    """
    what, _, examples = docstring.partition(EXAMPLES)
    if full:
        shown = flags.FLAGS.get_help()
    else:
        own = [flags.FLAGS.module_help(name) for name in flags.FLAGS.flags_by_module_dict() if not _is_library(name)]
        shown = "\n\n".join(text.split("\n", 2)[2] for text in own if text)  # without the modules' names
    parts = [what.strip(), f"Flags:\n\n{shown.rstrip()}"]
    if examples:
        parts.append(f"Examples:\n\n{examples.strip(chr(10)).rstrip()}")
    return "\n\n".join(parts)


def _is_library(module: str) -> bool:
    """Whether a module that defined flags is neither the command itself nor the project's."""
    return not (module.startswith("sra_jax.") or module == sys.argv[0] or module == "__main__")


def _unknown_flag(error: flags.UnrecognizedFlagError) -> str:
    group, _, key = error.flagname.partition(".")
    if not key or group not in flags.FLAGS:
        return str(error).replace(" command line flag", " flag")
    if not flags.FLAGS[group].present:
        return f"--{error.flagname} changes a value of a recipe: name the recipe with --{group}=FILE"
    if error.flagname in flags.FLAGS:
        return f"--{error.flagname} stands before --{group}=FILE, whose value it changes: write it behind"
    if members := [name for name in flags.FLAGS if name.startswith(f"{error.flagname}.")]:
        return f"--{error.flagname} is a group of keys: {', '.join(f'--{name}' for name in members)}"
    close = difflib.get_close_matches(error.flagname, flags.FLAGS, n=3)
    hint = f" Did you mean {' or '.join(f'--{name}' for name in close)}?" if close else ""
    return f"--{group} has no key {key}.{hint} docs/configuration.md lists every key"


def whole_flag(
    name: str, default: int | None, help_string: str, low: int, high: int, **options: Any
) -> flags.FlagHolder:
    """Define a flag of a whole number, low..high with both ends."""
    return flags.DEFINE(WholeParser(f"--{name}", low, high), name, default, help_string, **options)


def number_flag(
    name: str, default: float | None, help_string: str, low: float, high: float, open_low: bool = False, **options: Any
) -> flags.FlagHolder:
    """Define a flag of a finite number, low..high with both ends, or without `low` itself."""
    return flags.DEFINE(NumberParser(f"--{name}", low, high, open_low), name, default, help_string, **options)


def path_flag(
    name: str, default: str | None, help_string: str, local: bool = False, **options: Any
) -> flags.FlagHolder:
    """Define a flag of a path, a string in which `~` is expanded; an address, such as gs://, unless it is `local`."""
    return flags.DEFINE(PathParser(f"--{name}", local), name, default, help_string, **options)


def paths_flag(
    name: str, default: str | None, help_string: str, local: bool = False, **options: Any
) -> flags.FlagHolder:
    """Define a flag of paths with commas between, a list; each as `path_flag` takes it."""
    return flags.DEFINE(PathsParser(f"--{name}", local), name, default, help_string, **options)


def source_flag(name: str, default: str | None, help_string: str, **options: Any) -> flags.FlagHolder:
    """Define a flag of a path that may have its kind in front, KIND:PATH; see `values.source`."""
    return flags.DEFINE(SourceParser(f"--{name}"), name, default, help_string, **options)


class WholeParser(flags.ArgumentParser):
    """Of `whole_flag`."""

    def __init__(self, name: str, low: int, high: int):
        self._name, self._low, self._high = name, low, high
        self.syntactic_help = f"a whole number {low} to {high}"

    def parse(self, argument: str | int) -> int:
        """A whole number of the range, or a `UserError`."""
        return values.whole(self._name, argument, self._low, self._high)


class NumberParser(flags.ArgumentParser):
    """Of `number_flag`."""

    def __init__(self, name: str, low: float, high: float, open_low: bool):
        self._name, self._low, self._high, self._open_low = name, low, high, open_low
        self.syntactic_help = f"a number {'above' if open_low else 'from'} {low:g} to {high:g}"

    def parse(self, argument: str | float) -> float:
        """A number of the range, or a `UserError`."""
        return values.number(self._name, argument, self._low, self._high, open_low=self._open_low)


class PathParser(flags.ArgumentParser):
    """Of `path_flag`."""

    def __init__(self, name: str, local: bool = False):
        self._name, self._local = name, local

    def parse(self, argument: str) -> str:
        """A path, or a `UserError`."""
        return values.path(self._name, argument, self._local)


class PathsParser(flags.ArgumentParser):
    """Of `paths_flag`."""

    def __init__(self, name: str, local: bool = False):
        self._name, self._local = name, local

    def parse(self, argument: str) -> list[str]:
        """Paths, or a `UserError`."""
        return [values.path(self._name, part.strip(), self._local) for part in argument.split(",")]


class SourceParser(flags.ArgumentParser):
    """Of `source_flag`."""

    def __init__(self, name: str):
        self._name = name

    def parse(self, argument: str) -> str:
        """A name or a path, or a `UserError`."""
        return values.source(self._name, argument)


_at_once = False


def end_at_once() -> None:
    """Let `run` end the process as soon as its message is printed: what would be done at exit waits for others."""
    global _at_once
    _at_once = True


def _report_of_main_thread(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Libraries' own threads report here what follows from an error that the main thread is told of anyway."""
    if threading.current_thread() is threading.main_thread():
        sys.__excepthook__(kind, error, trace)
