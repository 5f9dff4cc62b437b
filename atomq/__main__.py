"""``python -m atomq``: the same program as the ``atomq`` command."""

from atomq.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
