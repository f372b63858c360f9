"""Progress bars: of tokens that go through a model, and of what runs in the Rust core."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

if TYPE_CHECKING:
    from collections.abc import Iterator

Progress = Callable[[int, int], None]
"""Called with (done, total) now and then."""


def token_bar(total: int, description: str, enabled: bool, initial: int = 0) -> tqdm[Any]:
    """A bar that counts tokens, since those of a response tell its time."""
    return tqdm(total=total, initial=initial, desc=description, unit="token", unit_scale=True, disable=not enabled)


@contextlib.contextmanager
def core_progress(description: str, enabled: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar as the callback that the Rust core takes; None where none is wanted."""
    if not enabled:
        yield None
        return
    with tqdm(desc=description, bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}") as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.n = done
            bar.refresh()

        yield report
