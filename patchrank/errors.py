"""The one error type for mistakes that a user can mend."""


class UserError(ValueError):
    """Bad input, said in one line: the value received, the rule it breaks, the remedy.

    Commands print it without a traceback and leave with exit code 2 (`patchrank.cli`).
    """
