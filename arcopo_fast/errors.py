"""The one exception that a command turns into one line and exit status 2.

Raise it where a person gave something that cannot be used. The message says what was given, what was expected and what to do.
"""


class UserError(ValueError):
    """Input that cannot be used: a recipe, an override, a checkpoint, a directory."""
