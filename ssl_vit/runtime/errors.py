"""Exceptions that the command line turns into a message and an exit code."""


class UserError(ValueError):
    """A mistake of the user's: the message states what is wrong, where, and what to do. Exit code 2, no traceback."""


class RankFinished(Exception):  # noqa: N818 - not an error
    """The work of this rank is done, only rank 0 continues. Exit code 0."""


class AllRanksError(UserError):
    """A mistake that all ranks find at the same time; only rank 0 prints it."""
