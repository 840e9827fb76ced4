"""The frame around every command: flags are parsed, the job runs, bad input ends with one clear message."""

import os
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from sra_jax.errors import Preempted, RunError, UserError

# TensorFlow, which clu and tensorflow-datasets import, greets with warnings about what it was not built for.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again later
EXIT_INTERRUPTED = 130

EXAMPLES = "\nExamples:\n"
"""The line in a command's docstring from which on `--help` shows it after the flags: what is read last is at hand."""
HELP = ("--help", "-help", "--helpshort", "-h", "-?")
HELP_FULL = ("--helpfull",)


def run(main: Callable[[], int | None], argv: Sequence[str] | None = None) -> None:
    """Parse the flags, call `main()` and exit with what it returns (None means 0).

    Args:
      main: the job; it reads `absl.flags.FLAGS`.
      argv: the command line, by default the process's own.

    `--help` shows the docstring of the command's file, its flags and, last, its examples, and exits with code 0;
    `--helpfull` shows the flags of all libraries, too. A `UserError` from `main`, an unknown flag and an unknown config
    key print their message to stderr and exit with code 2, a `RunError` with code 1, a `Preempted` with code 75.
    """

    def guarded(arguments: Sequence[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.ERROR)  # libraries narrate every file they touch
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
        except Preempted as notice:
            print(notice, file=sys.stderr)
            code = EXIT_PREEMPTED
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            code = EXIT_INTERRUPTED
        sys.exit(code or 0)

    def parse(arguments: Sequence[str]) -> list[str]:
        for asked, full in ((HELP, False), (HELP_FULL, True)):
            if set(asked) & set(arguments[1:]):
                print(help_text(sys.modules["__main__"].__doc__ or "", full))
                sys.exit(0)
        try:
            return flags.FLAGS(arguments)
        except (flags.Error, UserError) as error:
            message = str(error)
            if "Traceback" in message and (reason := message.strip().splitlines()[-1]).startswith("ValueError: "):
                # A recipe refuses its variant with a ValueError, which config flags wrap in its whole traceback.
                message = f"{message.split(': ')[0]}: {reason.removeprefix('ValueError: ')}"
        except (AttributeError, KeyError) as error:  # how config flags speak of a key that the recipe does not have
            detail = str(error.args[0]).replace("\n", "; ")
            message = f"--config has no key {detail}; docs/configuration.md lists every key"
        except (TypeError, ValueError) as error:
            message = f"a --config value does not fit its key: {error}"
        print(f"error: {message}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)

    app.run(guarded, argv=argv, flags_parser=parse)


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
