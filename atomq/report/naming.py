"""Names of the records in a checkpoint's reports."""

from __future__ import annotations

import re


def record_name(*parts: object) -> str:
    """A file name from parts, such as "eval-ppl-builtin-4x1024"; anything odd becomes "_"."""
    return "-".join(re.sub(r"[^A-Za-z0-9._-]+", "_", str(part)) for part in parts)
