"""The two ways a command ends badly: the user's input is wrong, or the run failed.

Both carry one line that a person can act on. `cli` turns them into exit codes 2 and 3; nothing else catches them.
"""


class InputError(ValueError):
    """The recipe, the data or the request is wrong. The message names the key, or the file and row. Exit code 2."""


class RunFailed(RuntimeError):
    """The run could not go on: the cause in one line. Exit code 3."""
