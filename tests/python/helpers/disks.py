"""Files that hold file systems, so that tests can fill and break them."""

import os
import shutil
import subprocess

import pytest


def run(*command):
    """Runs a command that must succeed."""
    subprocess.run(command, check=True, capture_output=True)


def image(path, size, make):
    """A file of ``size`` bytes that holds a file system, made by the command ``make``."""
    if not shutil.which(make[0]):
        pytest.skip(f"{make[0]} is not installed")
    path.touch()
    os.truncate(path, size)
    run(*make, path)
    return path
