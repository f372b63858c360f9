"""Faults to plant into the core, each with the tests that must notice it."""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Fault:
    """`new` in place of `old`, a text that occurs once in `file`, below rust/, changes a result or breaks a promise.

    It counts as found once a test fails of those that `rust` tells `cargo test` to run, or that `python` tells pytest
    to run in tests/python/core. Only what can be seen from outside is listed: a bound that is a little wider than it
    has to be, or work that is done twice, is no fault.
    """

    name: str
    file: str
    old: str
    new: str
    rust: str = ""
    python: str = ""

    @property
    def path(self):
        return ROOT / "rust" / self.file

    def occurrences(self):
        return self.path.read_text(encoding="utf-8").count(self.old) if self.path.exists() else 0


def faults():
    """All of them, the parts of the core in turn."""
    from choices import CHOICES
    from kmeans import KMEANS
    from rest import REST

    return [*KMEANS, *CHOICES, *REST]
