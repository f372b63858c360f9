"""What is installed beside bpo, and how to install what is not."""

from __future__ import annotations

import os
import warnings
from typing import Any

DISTRIBUTION = "balanced-preference-optimization"
"""What bpo is called on the package index, where ``bpo`` is another project."""


def import_matplotlib() -> Any:
    """Imports matplotlib.

    Raises:
        ImportError: It is missing; the message says how to install it.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            f"Figures need matplotlib, which is not installed: pip install '{DISTRIBUTION}[compare]'"
        ) from error
    return matplotlib


def missing(what: str, error: ModuleNotFoundError) -> str:
    """Returns the sentence for something that cannot be used because a package is missing."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "bpo"):
        return str(error)
    return f"{what} needs {package}, which is not installed: pip install {DISTRIBUTION}"


def warn_of_namesake(package: str) -> None:
    """Warns where the other project of the name was installed into the directory that holds this package.

    Both then have files in the one package and the command ``bpo`` is that of the later one.

    Args:
        package: The directory of this package.
    """
    site = os.path.dirname(package)  # noqa: PTH120, for `import bpo` needs no pathlib
    try:
        names = os.listdir(site)  # noqa: PTH208
    except OSError:  # within a zip file
        return
    # Read from the names, for importlib.metadata would take as long to import as all else that `import bpo` does.
    found = sorted(name for name in names if name.startswith("bpo-") and name.endswith((".dist-info", ".egg-info")))
    if found:
        warnings.warn(
            f"The package 'bpo' of the index, which is another project, was installed over {DISTRIBUTION} ({found[0]} "
            f"in {site}): the command bpo may be its, and files of the two lie among each other. To mend it: "
            f"pip uninstall --yes bpo && pip install --force-reinstall --no-deps {DISTRIBUTION}",
            stacklevel=3,
        )
