"""Where responses come from: what a source must do, and a server as one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from bpo.data.columns import template_columns
from bpo.responses.client import ChatError

if TYPE_CHECKING:
    import numpy.typing as npt

    from bpo.responses.client import ChatServer
    from bpo.responses.prompts import PromptResponses


class Sampled(NamedTuple):
    """A response.

    Attributes:
        text: What was said.
        truncated: Whether it was cut at the token limit.
        refused: Whether a server marks it as a refusal.
    """

    text: str
    truncated: bool
    refused: bool


class Source(Protocol):
    """What can be asked for responses.

    Attributes:
        failures: What became of requests that failed, with the rows of the data that they were for.
    """

    failures: list[str]

    def describe(self) -> dict[str, Any]:
        """Returns what identifies the source in a manifest."""

    def fitting(self, rows: Sequence[PromptResponses]) -> list[PromptResponses]:
        """Returns the prompts that can be responded to, as the source takes them."""

    def blocks(self, rows: Sequence[PromptResponses]) -> list[list[int]]:
        """Cuts the rows, by index, into those that a process of a job takes at a time."""

    def sample(
        self, rows: Sequence[PromptResponses], todo: Sequence[int], on_response: Callable[[int], Any]
    ) -> Iterator[tuple[int, Sequence[Sampled | ChatError]]]:
        """Yields the responses to each prompt in ``todo`` with its index, as they are finished.

        Args:
            rows: What :meth:`fitting` returned.
            todo: Indices of rows.
            on_response: Is told how many more responses there are.
        """


def random_stream(seed: int, prompt: bytes, response: int, length: int) -> npt.NDArray[np.float64]:
    """Returns the random numbers of one response: ``length`` uniforms in [0, 1), of which more begin with the same."""
    key = hashlib.sha256(f"{seed} {response} ".encode() + prompt).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little"))).random(length)


class ServerSource:
    """A server, asked for each response in a request of its own, since some ignore ``n``."""

    def __init__(self, server: ChatServer, settings: Mapping[str, Any]) -> None:
        self.server = server
        self.settings = settings
        self.failures: list[str] = []

    def describe(self) -> dict[str, Any]:
        """Returns address, model and what is added to requests."""
        return self.server.describe()

    def fitting(self, rows: Sequence[PromptResponses]) -> list[PromptResponses]:
        """Makes text the user's turn of a chat."""
        for row in rows:
            if isinstance(row.prompt, str):
                row.prompt = [{"role": "user", "content": row.prompt}]
        return list(rows)

    def blocks(self, rows: Sequence[PromptResponses]) -> list[list[int]]:
        """All at once, since one process asks a server."""
        return [list(range(len(rows)))]

    def sample(
        self, rows: Sequence[PromptResponses], todo: Sequence[int], on_response: Callable[[int], Any]
    ) -> Iterator[tuple[int, list[Sampled | ChatError]]]:
        """Yields the responses to each prompt, failed requests among them, as soon as its last one is there."""
        count = self.settings["n_responses"]
        sampled: dict[int, dict[int, Sampled | ChatError]] = {index: {} for index in todo}
        requests = (self._request(rows[index], response) for index in todo for response in range(count))
        for place, reply in self.server.map(requests):
            index, response = todo[place // count], place % count
            on_response(1)
            if isinstance(reply, ChatError):
                self.failures.append(f"row {rows[index].row}: {reply}")
                sampled[index][response] = reply
            else:
                cut = reply.finish_reason == "length"
                sampled[index][response] = Sampled(reply.text.strip(), truncated=cut, refused=reply.refused)
            if len(sampled[index]) == count:
                done = sampled.pop(index)
                yield index, [done[response] for response in range(count)]

    def _request(self, row: PromptResponses, response: int) -> dict[str, Any]:
        # A seed that every server takes: 31 bits.
        seed = int(random_stream(self.settings["seed"], row.key, response, 1)[0] * 2**31)
        return {
            "messages": row.prompt,
            "temperature": self.settings["temperature"],
            "top_p": self.settings["top_p"],
            "max_tokens": self.settings["max_new_tokens"],
            "seed": seed,
            **template_columns(row.template_kwargs),
        }
