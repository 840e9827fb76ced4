"""The exceptions whose message is all that a user needs to see."""


class UserError(Exception):
    """Bad input from outside: a flag, a config, a file.

    The message stands on its own: what was given, what is allowed, what to change. `sra_jax.cli.run` prints it
    without a traceback and exits with code 2.
    """


class Busy(UserError):
    """Another program holds the lock of what is to be written."""


class Preempted(Exception):
    """A run that was told to make room and has saved itself: start the same command again. Exit code 75."""


class Interrupted(Exception):
    """A run that was told to stop by Ctrl-C and has saved itself. Exit code 130."""


class RunError(Exception):
    """A run that cannot go on, such as one whose loss is no longer finite. Printed like `UserError`; exit code 1."""
