"""The one exception that is meant for the person at the keyboard."""


class UserError(Exception):
    """Something the user can mend: a wrong setting, a missing folder, a full disk.

    Its message names the thing, its value, what is accepted and the fix. The command line prints the message
    alone, without a traceback, and exits with status 2.
    """
