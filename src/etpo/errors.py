"""The one exception that a user's input can raise."""


class ConfigError(ValueError):
    """A bad input: one line that names the config key and what is allowed.

    Entry points print the message and exit with status 2; no traceback is shown.
    """
