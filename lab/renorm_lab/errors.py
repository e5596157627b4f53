"""The one exception whose message is all that a user needs to see."""


class LabError(Exception):
    """Something outside the program is wrong: an option, a file, a process. The message is one line, or a list."""
