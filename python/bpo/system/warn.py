"""Warnings at the line of the user's code."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the line of the user's code that called into bpo."""
    here = str(Path(__file__).parents[1]) + os.sep
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(here):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
