"""The one exception that means "the user can mend this": value, rule, remedy, in one line.

The command line prints it and exits with 2; anything else that escapes is our bug and keeps its traceback.
"""


class UserError(ValueError):
    """A mistake in a config, a path or an argument. Its text names the value, the rule and the remedy."""
