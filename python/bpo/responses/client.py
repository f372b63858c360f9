"""A client of OpenAI-compatible chat servers: concurrent, paced, retrying, with a cache on disk."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import queue
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping


class ChatError(RuntimeError):
    """A request that the server did not answer; others may still go through."""


@dataclasses.dataclass(frozen=True)
class ChatReply:
    """What a server answered.

    Attributes:
        text: The message.
        finish_reason: ``"stop"``; ``"length"`` where it was cut at the token limit; or what else the server says.
        refused: Whether the server marks it as a refusal, or filtered it.
    """

    text: str
    finish_reason: str
    refused: bool = False


class ChatServer:
    """An OpenAI-compatible server: vLLM, TGI, SGLang, llama.cpp, ``transformers serve``, or a hosted one.

    Needs the package openai (the extra ``judge``). Connection errors, timeouts and the statuses 408, 409, 429 and 5xx
    are tried again by that client, with exponential backoff and jitter, or after the time that the server's
    ``Retry-After`` names.

    Args:
        base_url: Address, such as ``"http://localhost:8000/v1"``; ``/v1`` may be left out where there is no path.
        model: Name of the model as the server knows it.
        api_key: Key; no environment variable is read, so that no key goes to a server that it was not meant for.
        concurrency: Requests under way at a time.
        requests_per_minute: Most requests a minute, retries included, evenly spaced; ``None`` for no limit.
        timeout: Seconds that one request may take.
        max_retries: Attempts after the first.
        cache: JSONL file of earlier replies. A request that is the same in everything (address, model, messages,
            settings, seed) is answered from there. Several processes may share it.
        extra_body: Fields of every request, which go before those that are sent anyway; None takes one out. So
            ``{"max_tokens": None, "temperature": None, "max_completion_tokens": 512}`` is for models that know no
            other.

    Raises:
        ImportError: openai is not installed.
        ValueError: A setting out of range.

    Example:
        >>> import bpo
        >>> server = bpo.ChatServer("http://localhost:8000", "my-model", requests_per_minute=600)
        >>> server
        ChatServer('http://localhost:8000/v1', 'my-model')
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        *,
        concurrency: int = 8,
        requests_per_minute: float | None = None,
        timeout: float = 120.0,
        max_retries: int = 6,
        cache: str | os.PathLike[str] | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            import openai
        except ImportError:
            raise ImportError("Servers need the package openai: pip install 'bpo[judge]'.") from None
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url must begin with http:// or https://, got {base_url!r}.")
        if concurrency < 1 or max_retries < 0 or timeout <= 0:
            raise ValueError("concurrency must be at least 1, max_retries at least 0 and timeout above 0.")
        if requests_per_minute is not None and requests_per_minute <= 0:
            raise ValueError(f"requests_per_minute must be above 0, got {requests_per_minute}.")
        base_url = base_url.rstrip("/")
        self.base_url = base_url if "/" in base_url.split("://", 1)[1] else f"{base_url}/v1"
        self.model = model
        self.concurrency = concurrency
        self.extra_body = dict(extra_body or {})
        self.n_requests = 0  # attempts that went out
        self.n_cached = 0
        self._timeout = timeout
        self._interval = 0.0 if requests_per_minute is None else 60.0 / requests_per_minute
        self._next_slot = 0.0
        self._lock = threading.Lock()
        self._cache = None if cache is None else _ReplyCache(Path(cache).expanduser())
        self._client = openai.OpenAI(
            base_url=self.base_url,
            # The client insists on one; local servers take anything.
            api_key=api_key or "none",
            timeout=timeout,
            max_retries=max_retries,
            # Called for every attempt, so that retries keep to the limit, too.
            http_client=openai.DefaultHttpxClient(event_hooks={"request": [self._pace]}),
        )

    def __repr__(self) -> str:
        return f"ChatServer({self.base_url!r}, {self.model!r})"

    def describe(self) -> dict[str, Any]:
        """Returns what replies depend on, as JSON."""
        return {"base_url": self.base_url, "model": self.model, "extra_body": self.extra_body}

    def complete(self, messages: list[dict[str, Any]], **settings: Any) -> ChatReply:
        """Asks for one reply.

        Args:
            messages: The conversation.
            settings: Fields of the request: ``temperature``, ``top_p``, ``max_tokens``, ``seed``, ``tools``, ….

        Returns:
            The reply, from the cache where it is there: ``text``, ``finish_reason`` (``"stop"``; ``"length"`` where it
            was cut at the token limit; or what else the server says) and ``refused`` (whether the server marks it so).

        Raises:
            ChatError: No answer to this request after all retries, or none that can be used.
            ConnectionError: The server cannot be reached.
            PermissionError: It does not accept the key.
            ValueError: It knows no such address or model.
        """
        fields = {**settings, **self.extra_body}
        fields = {name: value for name, value in fields.items() if value is not None}
        request = {"model": self.model, "messages": messages, **fields}
        key = _request_key(self.base_url, request)
        reply = None if self._cache is None else self._cache.get(key)
        if reply is not None:
            with self._lock:
                self.n_cached += 1
            return reply
        reply = self._ask(request)
        if self._cache is not None:
            self._cache.put(key, reply)
        return reply

    def _ask(self, request: dict[str, Any]) -> ChatReply:
        import openai

        body = {name: value for name, value in request.items() if name not in ("model", "messages")}
        try:
            answer = self._client.chat.completions.create(
                model=self.model, messages=request["messages"], extra_body=body
            )
        except openai.APITimeoutError:
            raise ChatError(f"no reply within {self._timeout:g} s") from None
        except openai.APIConnectionError as error:
            raise ConnectionError(f"{self.base_url} cannot be reached: {error.__cause__ or error}") from error
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise PermissionError(f"{self.base_url} does not accept the key: {error}") from error
        except openai.NotFoundError as error:
            raise ValueError(f"{self.base_url} knows no such address, or no model {self.model!r}: {error}") from error
        except openai.APIStatusError as error:
            said = error.body.get("message") if isinstance(error.body, dict) else None
            raise ChatError(f"status {error.status_code}: {_one_line(str(said or error.response.text))}") from None
        except (openai.OpenAIError, ValueError) as error:  # a body that is no JSON, or not that of a completion
            raise ChatError(f"the answer cannot be read: {_one_line(str(error))}") from None
        try:
            choice = answer.choices[0]
            message, reason = choice.message, str(choice.finish_reason or "stop")
            refusal = getattr(message, "refusal", None)
            refused = bool(refusal) or reason == "content_filter"
            return ChatReply(str(message.content or refusal or ""), reason, refused)
        except (AttributeError, IndexError, TypeError):
            raise ChatError(f"the answer is no chat completion: {_one_line(str(answer))}") from None

    def _attempt(self, request: Mapping[str, Any]) -> ChatReply | BaseException:
        try:
            return self.complete(**request)
        except BaseException as error:  # whatever it is, the caller of map hears of it
            return error

    def _pace(self, _: Any) -> None:
        """Waits for the next free slot of the limit."""
        with self._lock:
            self.n_requests += 1
            slot = max(time.monotonic(), self._next_slot)
            self._next_slot = slot + self._interval
        time.sleep(max(0.0, slot - time.monotonic()))

    def map(self, requests: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, ChatReply | ChatError]]:
        """Asks for many replies at a time.

        Args:
            requests: The arguments of :meth:`complete`, each. Read only as far ahead as needed.

        Yields:
            The index of a request with its reply, or with why there is none, in the order in which they come.

        Raises:
            ConnectionError, PermissionError, ValueError: As :meth:`complete`; the other requests are given up.
        """
        waiting = enumerate(requests)
        tasks: queue.SimpleQueue[tuple[int, Mapping[str, Any]] | None] = queue.SimpleQueue()
        results: queue.SimpleQueue[tuple[int, ChatReply | BaseException]] = queue.SimpleQueue()
        stopped = threading.Event()

        def work() -> None:
            while (task := tasks.get()) is not None and not stopped.is_set():
                results.put((task[0], self._attempt(task[1])))

        # Daemons, so that an interrupted program need not wait for replies that nobody reads.
        for _ in range(self.concurrency):
            threading.Thread(target=work, daemon=True).start()
        pending = 0
        try:
            for task in itertools.islice(waiting, 2 * self.concurrency):
                tasks.put(task)
                pending += 1
            while pending:
                index, result = results.get()
                pending -= 1
                following = next(waiting, None)
                if following is not None:
                    tasks.put(following)
                    pending += 1
                if isinstance(result, BaseException) and not isinstance(result, ChatError):
                    raise result
                yield index, result
        finally:
            stopped.set()
            for _ in range(self.concurrency):
                tasks.put(None)


class _ReplyCache:
    """Replies by the hash of their request: JSONL, a line each, appended in one write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.replies: dict[str, ChatReply] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.exists() else b""
        for line in data.splitlines():
            self._read(line)
        if data and not data.endswith(b"\n"):
            self._append(b"\n")

    def _read(self, line: bytes) -> None:
        # One that was cut off when its writer was killed is left out: that request is simply sent again.
        with contextlib.suppress(ValueError, TypeError, KeyError):
            entry = json.loads(line)
            self.replies[entry["key"]] = ChatReply(**entry["reply"])

    def get(self, key: str) -> ChatReply | None:
        return self.replies.get(key)

    def put(self, key: str, reply: ChatReply) -> None:
        self.replies[key] = reply
        self._append((json.dumps({"key": key, "reply": dataclasses.asdict(reply)}) + "\n").encode())

    def _append(self, data: bytes) -> None:
        # A single write in append mode, so that lines of several threads and processes do not mix.
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, data)
        finally:
            os.close(handle)


def _request_key(base_url: str, request: Mapping[str, Any]) -> str:
    text = json.dumps([base_url, request], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _one_line(text: str, most: int = 200) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"
