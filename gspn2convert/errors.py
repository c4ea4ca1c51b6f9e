"""Mistakes of the user's, told in one line."""


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message is one line: what was given, what was expected, what to do. The command line
    prints it without a traceback and exits with code 2.
    """


class RecipeError(UserError):
    """A recipe cannot be read; the message names the place, for example `recipe.align.lr`."""
