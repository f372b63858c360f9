"""A client of OpenAI-compatible chat servers: concurrent, paced, retrying, with a cache on disk."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import email.utils
import hashlib
import itertools
import json
import math
import numbers
import os
import queue
import random
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bpo.system.peer import LostConnectionError, Peer
from bpo.system.secrets import Secrets, without_secrets
from bpo.system.warn import warn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import httpx2

# Failures that are hardly those of a single request, and how many in a row are taken for those of the server.
_OF_THE_SERVER = (ConnectionError, PermissionError, ValueError)
_IN_A_ROW = 16


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

    Needs the package httpx2 (the extra ``judge``). Lost connections, timeouts and the statuses 408, 409, 429 and 5xx
    are tried again, with exponential backoff and jitter, or after the time that the server's ``Retry-After`` names.
    Each attempt has a connection of its own, so that no reply is taken for that to another request. Redirects are not
    followed, and a reply of more than 16 MiB is not read.

    No environment variable and no ``.netrc`` is read: keys, proxies and certificates are those given here. Keys and
    passwords appear in no message, manifest or ``repr``, also where the server repeats them; a reply that does is a
    failure.

    Args:
        base_url: Address, such as ``"http://localhost:8000/v1"``; ``/v1`` may be left out where there is no path. It
            may hold a user and a password.
        model: Name of the model as the server knows it.
        api_key: Key, which is sent to this address alone.
        concurrency: Requests under way at a time.
        requests_per_minute: Most requests a minute, retries included, evenly spaced; ``None`` for no limit.
        timeout: Seconds that one attempt may take, from the connection to the last byte of the reply.
        max_retries: Attempts after the first.
        max_retry_after: Longest ``Retry-After`` that is waited for, in seconds. A request that is to wait longer fails
            at once.
        cache: JSONL file of earlier replies. A request that is the same in everything (address, model, messages,
            settings, seed) is answered from there. Several processes may share it.
        extra_body: Fields of every request, which go before those that are sent anyway; None takes one out. So
            ``{"max_tokens": None, "temperature": None, "max_completion_tokens": 512}`` is for models that know no
            other.
        proxy: Address of an HTTP proxy, with its user and password where it needs them.
        ca_file: PEM file of the certificates to trust, in place of those of the system.

    Raises:
        ImportError: httpx2 is not installed.
        ValueError: A setting out of range.
        OSError: A ``cache`` or ``ca_file`` that cannot be read.

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
        max_retry_after: float = 600.0,
        cache: str | os.PathLike[str] | None = None,
        extra_body: Mapping[str, Any] | None = None,
        proxy: str | None = None,
        ca_file: str | os.PathLike[str] | None = None,
    ) -> None:
        _check(concurrency, requests_per_minute, timeout, max_retries, max_retry_after)
        self._extra_body, self._shown_body, body_secrets = _fields(extra_body)
        self._peer = Peer(base_url, "/v1", "/chat/completions", api_key, timeout=timeout, proxy=proxy, ca_file=ca_file)
        self._secrets = Secrets([*self._peer.secrets, *body_secrets])
        self.base_url = self._peer.shown
        self.model = model
        self.concurrency = concurrency
        self.n_requests = 0  # attempts that went out
        self.n_cached = 0
        self._timeout = timeout
        self._max_retries = max_retries
        self._max_retry_after = max_retry_after
        self._interval = 0.0 if requests_per_minute is None else 60.0 / requests_per_minute
        self._next_slot = 0.0
        self._lock = threading.Lock()
        self._cache = None if cache is None else _ReplyCache(Path(cache).expanduser())

    def __repr__(self) -> str:
        return f"ChatServer({self.base_url!r}, {self.model!r})"

    def describe(self) -> dict[str, Any]:
        """Returns what replies depend on, as JSON, without secrets."""
        return {"base_url": self.base_url, "model": self.model, "extra_body": self._shown_body}

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
            ValueError: It knows no such address or model, or answers with a redirect.
        """
        [(_, result)] = self._results([{"messages": messages, **settings}])
        if isinstance(result, ChatReply):
            return result
        raise result

    def map(self, requests: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, ChatReply | ChatError]]:
        """Asks for many replies at a time.

        Args:
            requests: The arguments of :meth:`complete`, each. Read only as far ahead as needed.

        Yields:
            The index of a request with its reply, or with why there is none, in the order in which they come.

        Raises:
            ConnectionError: The server cannot be reached, and never was; or not any more.
            PermissionError, ValueError: As :meth:`complete`. One such answer is a failure of its request; 16 in a row
                are the server's, and the other requests are given up.
        """
        in_a_row, reached = 0, False
        for index, result in self._results(requests):
            if isinstance(result, (ChatReply, ChatError)):
                in_a_row, reached = 0, True
                yield index, result
                continue
            in_a_row += 1
            unreachable = isinstance(result, ConnectionError)
            if in_a_row == _IN_A_ROW or (unreachable and not reached):
                raise result
            reached = reached or not unreachable
            yield index, ChatError(str(result))

    def _results(self, requests: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, ChatReply | Exception]]:
        """Yields the index of each request with its reply or what became of it, as they come."""
        waiting = enumerate(requests)
        results: queue.SimpleQueue[tuple[int, ChatReply | Exception]] = queue.SimpleQueue()
        slots = asyncio.Semaphore(self.concurrency)
        transport = self._peer.transport()
        loop = asyncio.new_event_loop()

        async def work(index: int, request: Mapping[str, Any]) -> None:
            async with slots:
                results.put((index, await self._result(transport, dict(request))))

        pending = 0
        try:
            # A daemon, so that an interrupted program need not wait for replies that nobody reads.
            threading.Thread(target=_run, args=(loop,), daemon=True).start()
            for task in itertools.islice(waiting, 2 * self.concurrency):
                asyncio.run_coroutine_threadsafe(work(*task), loop)
                pending += 1
            while pending:
                result = results.get()
                pending -= 1
                for task in itertools.islice(waiting, 1):
                    asyncio.run_coroutine_threadsafe(work(*task), loop)
                    pending += 1
                yield result
        finally:
            loop.call_soon_threadsafe(loop.stop)
            if self._cache is not None:
                self._cache.report()

    async def _result(self, transport: httpx2.AsyncHTTPTransport, request: dict[str, Any]) -> ChatReply | Exception:
        try:
            return await self._answer(transport, request)
        except Exception as error:  # whatever else it is, it is about this request
            known = (kind for kind in (ChatError, *_OF_THE_SERVER) if type(error) is kind)
            kind = next(known, None)
            said = str(error) if kind else f"{type(error).__name__}: {error}"
            return (kind or ChatError)(self._one_line(said, most=600))

    async def _answer(self, transport: httpx2.AsyncHTTPTransport, request: dict[str, Any]) -> ChatReply:
        messages = request.pop("messages")
        fields = {**request, **self._extra_body}
        fields = {name: value for name, value in fields.items() if value is not None}
        body = _encoded({"model": self.model, "messages": messages, **fields})
        # A key is no part of what was asked, and a hash of one is better not kept.
        shown = {name: self._shown_body.get(name, value) for name, value in fields.items()}
        key = _request_key(self.base_url, {"model": self.model, "messages": messages, **shown})
        reply = None if self._cache is None else self._cache.get(key)
        if reply is not None:
            with self._lock:
                self.n_cached += 1
            return reply
        reply = await self._ask(transport, body)
        if self._secrets.are_told_by(reply.text) or self._secrets.are_told_by(reply.finish_reason):
            raise ChatError("the reply repeats the key or a password, and is not kept")
        if self._cache is not None:
            self._cache.put(key, reply)
        return reply

    async def _ask(self, transport: httpx2.AsyncHTTPTransport, body: bytes) -> ChatReply:
        """Sends a request until it is answered, or has failed for good."""
        for attempt in itertools.count():
            wait: float | None = None
            try:
                await self._pace()
                status, headers, data = await asyncio.wait_for(self._peer.post(transport, body), self._timeout)
            except asyncio.TimeoutError:
                failure: Exception = ChatError(f"no reply within {self._timeout:g} s")
            except ConnectionError as error:
                failure = ConnectionError(f"{self.base_url} cannot be reached: {self._one_line(str(error))}")
            except LostConnectionError as error:
                failure = ChatError(f"the connection was lost: {self._one_line(str(error))}")
            else:
                if 200 <= status < 300:
                    try:
                        return _read_reply(data)
                    except ValueError as error:
                        raise ChatError(f"{error}: {self._one_line(_decoded(data))}") from None
                failure = self._status_error(status, headers, data)
                if status not in (408, 409, 429) and status < 500:
                    raise failure
                wait = _retry_after(headers)
                if wait is not None and wait > self._max_retry_after:
                    raise ChatError(
                        f"{failure}; it is to be asked again in {wait:g} s, and max_retry_after is "
                        f"{self._max_retry_after:g} s"
                    )
            if attempt >= self._max_retries:
                raise failure
            await asyncio.sleep(_backoff(attempt) if wait is None else wait)
        raise AssertionError("unreachable")

    async def _pace(self) -> None:
        """Waits for the next free slot of the limit; called for every attempt, so that retries keep to it, too."""
        with self._lock:
            self.n_requests += 1
            slot = max(time.monotonic(), self._next_slot)
            self._next_slot = slot + self._interval
        await asyncio.sleep(max(0.0, slot - time.monotonic()))

    def _status_error(self, status: int, headers: Mapping[str, str], data: bytes) -> Exception:
        said = self._one_line(_error_message(data))
        if status < 400:
            place = self._one_line(headers.get("location", "nowhere"))
            return ValueError(
                f"{self.base_url} answers with a redirect (status {status}) to {place}, which is not followed; give "
                "the address that is meant"
            )
        if status in (401, 403):
            return PermissionError(f"{self.base_url} does not accept the key (status {status}): {said}")
        if status == 404:
            return ValueError(f"{self.base_url} knows no such address, or no model {self.model!r} (status 404): {said}")
        return ChatError(f"status {status}: {said}")

    def _one_line(self, text: str, most: int = 200) -> str:
        """Returns the beginning of a text, of which a server may have said a part, as a line that can be shown."""
        text = " ".join(self._secrets.hide(text[:65536]).split())
        text = "".join(character if character.isprintable() else "�" for character in text)
        return text if len(text) <= most else text[: most - 1] + "…"


class _ReplyCache:
    """Replies by the hash of their request: JSONL, a line each, appended in one write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.replies: dict[str, ChatReply] = {}
        self._failure: OSError | None = None
        self._reported = False
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.exists() else b""
        for line in data.splitlines():
            self._read(line)
        if data and not data.endswith(b"\n"):
            self._append(b"\n")

    def _read(self, line: bytes) -> None:
        # One that was cut off when its writer was killed is left out: that request is simply sent again.
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            entry = json.loads(line)
            reply = ChatReply(**entry["reply"])
            _check_reply(reply.text, reply.finish_reason)
            self.replies[entry["key"]] = reply

    def get(self, key: str) -> ChatReply | None:
        return self.replies.get(key)

    def put(self, key: str, reply: ChatReply) -> None:
        """Keeps a reply; one that cannot be written is still good."""
        self.replies[key] = reply
        if self._failure is not None:
            return
        try:
            self._append((json.dumps({"key": key, "reply": dataclasses.asdict(reply)}) + "\n").encode())
        except OSError as error:
            self._failure = error

    def report(self) -> None:
        """Warns, once, where replies could not be written."""
        if self._failure is not None and not self._reported:
            self._reported = True
            warn(f"The cache cannot be written any more, and later replies are not in it: {self._failure}")

    def _append(self, data: bytes) -> None:
        # A single write in append mode, so that lines of several threads and processes do not mix.
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            written = os.write(handle, data)
            if written < len(data):
                raise OSError(f"{self.path} took {written} of the {len(data)} bytes of a reply")
        finally:
            os.close(handle)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """Runs a loop until it is stopped, and then ends what is under way."""
    try:
        loop.run_forever()
        loop.run_until_complete(_cancel_others())
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()


async def _cancel_others() -> None:
    while tasks := asyncio.all_tasks() - {asyncio.current_task()}:  # those, too, that others begin as they end
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _check(
    concurrency: int,
    requests_per_minute: float | None,
    timeout: float,
    max_retries: int,
    max_retry_after: float,
) -> None:
    for name, count, least in (("concurrency", concurrency, 1), ("max_retries", max_retries, 0)):
        if isinstance(count, bool) or not isinstance(count, numbers.Integral) or count < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {count!r}.")
    if not timeout > 0:
        raise ValueError(f"timeout must be above 0, got {timeout!r}.")
    if not max_retry_after >= 0:
        raise ValueError(f"max_retry_after must be at least 0, got {max_retry_after!r}.")
    if requests_per_minute is not None and not requests_per_minute > 0:
        raise ValueError(f"requests_per_minute must be above 0, got {requests_per_minute!r}.")


def _fields(extra_body: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Returns the fields to be sent, the same as they may be shown, and the secrets in them."""
    if extra_body is not None and not isinstance(extra_body, Mapping):
        raise ValueError(f"extra_body must be fields with their values, not {type(extra_body).__name__}.")
    fields = dict(extra_body or {})
    for name in ("model", "messages", "stream"):
        if fields.get(name):
            raise ValueError(f"extra_body: {name} cannot be set there.")
    try:
        json.dumps(fields, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise ValueError("extra_body must be JSON, without NaN and infinities.") from None
    shown, secrets = without_secrets(fields)
    return fields, shown, secrets


def _encoded(request: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(request, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise ChatError("the request holds half a character (a lone surrogate), which cannot be sent") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ChatError(f"the request cannot be written as JSON: {error}") from None


def _request_key(base_url: str, request: Mapping[str, Any]) -> str:
    text = json.dumps([base_url, request], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _read_reply(data: bytes) -> ChatReply:
    """Reads the body of a chat completion.

    Raises:
        ValueError: It is something else; says what.
    """
    try:
        answer = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise ValueError("the answer cannot be read") from None
    choices = answer.get("choices") if isinstance(answer, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise ValueError("the answer is no chat completion")
    assert isinstance(choice, dict)
    content, refusal, reason = message.get("content"), message.get("refusal"), choice.get("finish_reason")
    for name, value in (("content", content), ("refusal", refusal), ("finish_reason", reason)):
        if not isinstance(value, (str, type(None))):
            raise ValueError(f"the answer's {name} is no text")
    reply = ChatReply(content or refusal or "", reason or "stop", bool(refusal) or reason == "content_filter")
    _check_reply(reply.text, reply.finish_reason)
    return reply


def _check_reply(text: Any, finish_reason: Any) -> None:
    try:
        text.encode()
        finish_reason.encode()
    except (AttributeError, UnicodeEncodeError):
        raise ValueError("the answer holds half a character (a lone surrogate)") from None


def _error_message(data: bytes) -> str:
    """Returns what a server says of an error: in the usual places, or all of it."""
    text = _decoded(data)
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        return text
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    said = error.get("message", error.get("detail")) if isinstance(error, dict) else error
    return said if isinstance(said, str) else text


def _decoded(data: bytes) -> str:
    return data.decode("utf-8-sig", errors="replace")


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Returns the seconds that a server asks to wait for, None where it does not or says no time."""
    in_ms, given = headers.get("retry-after-ms"), headers.get("retry-after")
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        if in_ms is not None:
            seconds = float(in_ms) / 1000
        elif given is not None and given.strip()[:1].isalpha():
            seconds = max(0.0, email.utils.parsedate_to_datetime(given).timestamp() - time.time())
        else:
            seconds = float(given or "")
        if math.isfinite(seconds) and seconds >= 0:
            return seconds
    return None


def _backoff(attempt: int) -> float:
    """Half a second, doubled with each attempt up to eight, less up to a quarter, so that not all come back at once."""
    return min(8.0, 0.5 * 2.0 ** min(attempt, 10)) * (1 - 0.25 * random.random())
