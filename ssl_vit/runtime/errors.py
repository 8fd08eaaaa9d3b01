"""The error that a user can act on: the command prints it without a traceback and exits with 2."""


class UserError(ValueError):
    """A mistake of the user's: the text says what went wrong, where, and what to do."""


class RankFinished(Exception):  # noqa: N818 - no error: a process among several has done its part
    """There is nothing left for this process to do; the first one goes on."""


class AllRanksError(UserError):
    """What all processes of a run know at once; the first speaks for them."""
