"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """Bad input from outside: a flag, a config, a file.

    The message stands on its own: what was given, what is allowed, what to change. `sra_jax.cli.run` prints it
    without a traceback and exits with code 2.
    """
