"""Where the package's data folders lie: inside the package when installed, beside it in a checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def folder(name: str) -> Path:
    """Return the data folder `name` ("kernels_cuda" or "calibration_data").

    Raises:
        FileNotFoundError: the installation lacks the folder; the message names the places searched.
    """
    places = (_PACKAGE / name, _PACKAGE.parent / name)
    for place in places:
        if place.is_dir():
            return place
    raise FileNotFoundError(f"atomq's folder {name!r} is missing; searched {' and '.join(map(str, places))}")
