"""The frame around every command: flags are parsed, the job runs, bad input ends with one clear message."""

import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from sra_jax.errors import RunError, UserError

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def run(main: Callable[[], int | None], argv: Sequence[str] | None = None) -> None:
    """Parse the flags, call `main()` and exit with what it returns (None means 0).

    Args:
      main: the job; it reads `absl.flags.FLAGS`.
      argv: the command line, by default the process's own.

    A `UserError` from `main`, an unknown flag and an unknown config key print their message to stderr and exit with
    code 2, a `RunError` with code 1.
    """

    def guarded(arguments: Sequence[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # libraries narrate every file they touch
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
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            code = EXIT_INTERRUPTED
        sys.exit(code or 0)

    def parse(arguments: Sequence[str]) -> list[str]:
        try:
            return flags.FLAGS(arguments)
        except (flags.Error, UserError) as error:
            message = str(error)
        except (AttributeError, KeyError) as error:  # how config flags speak of a key that the recipe does not have
            detail = str(error.args[0]).replace("\n", "; ")
            message = f"--config has no key {detail}; sra_jax/config.py lists every key"
        except (TypeError, ValueError) as error:
            message = f"a --config value does not fit its key: {error}"
        print(f"error: {message}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)

    app.run(guarded, argv=argv, flags_parser=parse)
