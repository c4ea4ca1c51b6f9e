"""Mistakes of the user's, told in one line."""

import errno


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message is one line: what was given, what was expected, what to do. The command line
    prints it without a traceback and exits with code 2.
    """


class RecipeError(UserError):
    """A recipe cannot be read; the message names the place, for example `recipe.align.lr`."""


def is_disk_full(error: OSError) -> bool:
    """Whether something could not be written for want of space, on the disk or in the user's quota."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
