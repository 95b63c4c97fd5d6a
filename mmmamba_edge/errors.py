"""The one exception a user meets: it names the file or field, what was expected and what to do."""


class UserError(ValueError):
    """Bad input. The command line prints its message without a traceback and exits with 2."""


class CheckFailed(UserError):
    """A verification or accuracy check did not pass. The command line exits with 1."""
