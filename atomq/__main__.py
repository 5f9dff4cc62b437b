"""What the ``atomq`` command, ``python -m atomq`` and ``cli.py`` run.

Ctrl-C ends in a sentence from here on, so nothing that takes long to load is imported above.
"""

import sys


def main() -> int:
    """Run the command line; answer the exit code."""
    try:
        from atomq.cli import main as run

        return run()
    except KeyboardInterrupt:
        from atomq.errors import Interrupted

        sys.stderr.write(f"error: {Interrupted()}\n")
        return Interrupted.exit_code


if __name__ == "__main__":
    sys.exit(main())
