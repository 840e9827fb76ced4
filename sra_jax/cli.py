"""The frame around every command: flags are parsed, the job runs, bad input ends with one clear message."""

import sys
from collections.abc import Callable, Sequence

from absl import app, flags

from sra_jax.errors import UserError

EXIT_BAD_INPUT = 2


def run(main: Callable[[], int | None], argv: Sequence[str] | None = None) -> None:
    """Parse the flags, call `main()` and exit with what it returns (None means 0).

    Args:
      main: the job; it reads `absl.flags.FLAGS`.
      argv: the command line, by default the process's own.

    A `UserError` from `main`, an unknown flag and an unknown config key print their message to stderr and exit with
    code 2.
    """

    def guarded(arguments: Sequence[str]) -> None:
        try:
            if len(arguments) > 1:
                raise UserError(f"unexpected argument {arguments[1]!r}: every option is a flag, --name=value (see --help)")
            code = main()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            code = EXIT_BAD_INPUT
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            code = 130
        sys.exit(code or 0)

    def parse(arguments: Sequence[str]) -> list[str]:
        try:
            return flags.FLAGS(arguments)
        except (flags.Error, UserError, AttributeError, KeyError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(EXIT_BAD_INPUT)

    app.run(guarded, argv=argv, flags_parser=parse)
