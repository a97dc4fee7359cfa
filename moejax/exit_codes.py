"""Exit codes of every program. Launchers act on them: docs/launch.md.

An error names its code by an attribute `exit_code`; without one, it is FAILED.
"""

OK = 0
FAILED = 1  # start again, which may help: give up after some failures in a row
USAGE = 2  # flags, config, data or folder cannot be used: starting again does not help
FAILS_AGAIN = 65  # neither does it here: the same steps would end in the same way
RESUMABLE = 75  # progress was made and is saved: start again, any number of times
