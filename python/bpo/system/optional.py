"""Packages that only some of the work needs, and how to install them."""

from __future__ import annotations

import importlib
from typing import Any


def import_scipy(module: str) -> Any:
    """Imports a module of SciPy, such as ``"stats"``.

    Raises:
        ImportError: It is missing; the message says how to install it.
    """
    try:
        return importlib.import_module(f"scipy.{module}")
    except ImportError as error:
        raise ImportError("This needs SciPy, which is not installed: pip install 'bpo[compare]'") from error


def import_matplotlib() -> Any:
    """Imports matplotlib.

    Raises:
        ImportError: It is missing; the message says how to install it.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("Figures need matplotlib, which is not installed: pip install 'bpo[compare]'") from error
    return matplotlib
