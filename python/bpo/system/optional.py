"""Packages that only some of the work needs, and how to install them."""

from __future__ import annotations

from typing import Any


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
