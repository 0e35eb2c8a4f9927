"""Entry point of the `prunebench` command.

Asks the warm server first and imports the command line only where there is none: over the 600 jobs
of the embedded track, even the argument parser's imports would cost a minute.
"""

import sys

from prunebench.runtime import warm


def console() -> int:
    status = warm.delegate(sys.argv[1:])
    if status is not None:
        return status
    from prunebench.cli import main

    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(console())
