"""Run atomq from a clone without installing it: ``python cli.py quantize ...``."""

from atomq.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main())
