"""Mistakes of the user's, told in one line."""

import errno


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message is one line: what was given, what was expected, what to do. The command line
    prints it without a traceback and exits with code 2.
    """


class RecipeError(UserError):
    """A recipe cannot be read; the message names the place, for example `recipe.align.lr`."""


class SizeError(UserError):
    """A model cannot take images of the size asked for."""


def is_disk_full(error: OSError) -> bool:
    """Whether something could not be written for want of space, on the disk or in the user's quota."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether something did not fit into memory: Python says it by a type, PyTorch by one of its own or in words."""
    words = ("can't allocate memory", "Storage size calculation overflowed")
    kinds = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return kinds or (isinstance(error, RuntimeError) and any(each in str(error) for each in words))
