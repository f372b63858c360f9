"""A server of chat completions that does what servers do when they are broken, each request its own way.

What it does to a request is drawn from a seed and the request's last message, so that the same request always meets the
same. Sockets and bytes of its own: no library would say such things.
"""

import itertools
import json
import random
import socket
import struct
import threading
from email.utils import formatdate

OK = "HTTP/1.1 200 OK"


def completion(text, finish_reason="stop"):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return {"id": "x", "object": "chat.completion", "model": "m", "choices": [choice]}


def http(body, status=OK, *headers):
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    lines = [status, "Content-Type: application/json", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def choices(value):
    return http({**completion("x"), "choices": value})


def message(value):
    return choices([{"index": 0, "message": value, "finish_reason": "stop"}])


def chunks(text):
    body = json.dumps(completion(text)).encode()
    parts = [body[start : start + 7] for start in range(0, len(body), 7)] + [b""]
    head = f"{OK}\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    return head + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)


def error(status, headers):
    """Says what was wrong, and repeats all headers, the key among them."""
    return http({"error": {"message": f"no, since {headers}"}}, f"HTTP/1.1 {status} No")


# How a sound answer may come: (text, number of the attempt, headers) to bytes, or None to hang up.
SOUND = {
    "plain": lambda text, n, h: http(completion(text)),
    "chunks": lambda text, n, h: chunks(text),
    "until it closes": lambda text, n, h: f"{OK}\r\n\r\n{json.dumps(completion(text))}".encode(),
    "another reply behind it": lambda text, n, h: http(completion(text)) + http(completion("of another request")),
    "continue": lambda text, n, h: b"HTTP/1.1 100 Continue\r\n\r\n" + http(completion(text)),
    "byte order mark": lambda text, n, h: http(b"\xef\xbb\xbf" + json.dumps(completion(text)).encode()),
    "no reason": lambda text, n, h: http(completion(text, None)),
    "cookie": lambda text, n, h: http(completion(text), OK, "Set-Cookie: a=b") if "cookie" not in h else None,
    "hangs up once": lambda text, n, h: http(completion(text)) if n else None,
    "busy once": lambda text, n, h: http(completion(text)) if n else http({}, "HTTP/1.1 429 Busy", "Retry-After: 0"),
    "broken once": lambda text, n, h: http(completion(text)) if n else http({}, "HTTP/1.1 502 Bad"),
    "waits for nonsense": lambda text, n, h: (
        http(completion(text)) if n else http({}, "HTTP/1.1 503 Busy", f"Retry-After: {'9' * 400}")
    ),
}

# How none comes: (headers) to bytes, and what is then said of it, as an expression.
UNSOUND = {
    "hangs up": (lambda h: None, "connection was lost"),
    "half a head": (lambda h: b"HTTP/1.1 200 OK\r\nContent-Le", "connection was lost"),
    "half a body": (lambda h: http(completion("x" * 99))[:-50], "connection was lost"),
    "no HTTP": (lambda h: b"\x00\x01 hello\r\n\r\n", "connection was lost"),
    "negative length": (lambda h: b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "connection was lost"),
    "compressed": (lambda h: http(b"\x1f\x8b", OK, "Content-Encoding: gzip"), "compressed"),
    "no choices": (lambda h: choices([]), "no chat completion"),
    "choices {}": (lambda h: choices({}), "no chat completion"),
    "choices null": (lambda h: choices(None), "no chat completion"),
    "choices nested": (lambda h: choices([[[[{}]]]]), "no chat completion"),
    "message null": (lambda h: message(None), "no chat completion"),
    "content a list": (lambda h: message({"content": [{"type": "text", "text": "x"}]}), "content is no text"),
    "content a number": (lambda h: message({"content": 7}), "content is no text"),
    "reason nested": (lambda h: http(completion("x", {"a": []})), "finish_reason is no text"),
    "half an emoji": (lambda h: message({"content": "Rating: 5 \ud83d"}), "half a character"),
    "list": (lambda h: http([]), "no chat completion"),
    "no JSON": (lambda h: http(b"{not json"), "cannot be read"),
    "no UTF-8": (lambda h: http(json.dumps(completion("é"), ensure_ascii=False).encode("latin1")), "cannot be read"),
    "brackets": (lambda h: http(b"[" * 200_000), "cannot be read"),
    "repeats the key": (lambda h: message({"content": f"Rating: 5 {h['authorization']}"}), "repeats the key"),
    "bad request": (lambda h: error(400, h), "status 400"),
    "unauthorized": (lambda h: error(401, h), "does not accept the key"),
    "forbidden": (lambda h: error(403, h), "does not accept the key"),
    "not found": (lambda h: error(404, h), "no such address"),
    "error": (lambda h: error(500, h), "status 500"),
    "error of surrogates": (lambda h: http({"error": "\ud83d\x1b[31m"}, "HTTP/1.1 422 No"), "status 422"),
    "wait for a day": (lambda h: http({}, "HTTP/1.1 429 Busy", "Retry-After: 86400"), "86400 s"),
    "wait until 2099": (
        lambda h: http({}, "HTTP/1.1 503 Busy", f"Retry-After: {formatdate(4.07e9, usegmt=True)}"),
        "max_retry_after",
    ),
    # These go on for as long as the client listens, or for 64 MiB. Asked again, they hang up: one wait is enough.
    "silence": (lambda h: "", "connection was lost|no reply"),
    "drips its head": (lambda h: "HTTP/1.1 200 OK\r\nX: ", "connection was lost|no reply"),
    "drips its body": (lambda h: "HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", "connection was lost|no reply"),
    "drips chunks": (lambda h: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "connection was lost|no reply"),
    "floods": (lambda h: "HTTP/1.1 200 OK\r\n\r\n", "connection was lost|no reply"),
    "redirect": (lambda h: None, "redirect"),  # filled in by the server, which knows to where
}


class HostileServer:
    """Listens on loopback.

    Args:
        seed: Of what is drawn: the kinds are dealt like cards, so that each occurs in every 58 requests.
        answers: The sound text to a message, the last of a request.
        number_of: The number of a message.

    Attributes:
        url: Where it is.
        benign: Whether all answers are sound, and plain.
        seen: (message, headers) of each attempt.
        strayed: What came to the address that redirects lead to: nothing should.
    """

    def __init__(self, seed, answers, number_of):
        self.seed, self.answers, self.number_of = seed, answers, number_of
        self.benign, self.seen, self.strayed = False, [], []
        self._attempts, self._lock, self._stopped = {}, threading.Lock(), threading.Event()
        self._sockets = [self._listen(self._serve), self._listen(self._stray)]
        self.url, self.elsewhere = (f"http://127.0.0.1:{each.getsockname()[1]}" for each in self._sockets)

    def kind(self, number):
        """What becomes of a request."""
        kinds = [*SOUND, *SOUND, *UNSOUND]
        deal, place = divmod(number, len(kinds))
        return random.Random(f"{self.seed} {deal}").sample(kinds, len(kinds))[place]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stopped.set()
        for each in self._sockets:
            each.close()

    def _listen(self, serve):
        listening = socket.create_server(("127.0.0.1", 0), backlog=512)

        def accept():
            while not self._stopped.is_set():
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        return listening

    def _stray(self, connection):
        self.strayed.append(connection.recv(4096))
        connection.close()

    def _serve(self, connection):
        try:
            with connection, connection.makefile("rb") as file:
                # As many requests as a client likes to send over one connection.
                while file.readline():
                    headers = {}
                    while line := file.readline().decode("latin1").strip():
                        name, _, value = line.partition(":")
                        headers[name.lower()] = value.strip()
                    request = json.loads(file.read(int(headers["content-length"])))
                    if not self._answer(connection, request["messages"][-1]["content"], headers):
                        break
        except OSError:
            pass  # the client has gone

    def _answer(self, connection, message, headers):
        """Answers, and returns whether the connection is still good."""
        with self._lock:
            number = self._attempts.get(message, 0)
            self._attempts[message] = number + 1
            self.seen.append((message, headers))
        kind = "plain" if self.benign else self.kind(self.number_of(message))
        if kind == "redirect":
            answer = http({}, "HTTP/1.1 307 Elsewhere", f"Location: {self.elsewhere}/v1/chat/completions")
        elif kind in SOUND:
            answer = SOUND[kind](self.answers(message), number, headers)
        else:
            answer = UNSOUND[kind][0](headers)
        if isinstance(answer, str):
            if number == 0:
                self._send_on(connection, kind, answer.encode())
        elif answer is not None:
            connection.sendall(answer)
        elif number % 2:  # a reset, where it hangs up otherwise
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return kind in SOUND and kind != "until it closes" and answer is not None

    def _send_on(self, connection, kind, head):
        connection.sendall(head)
        drop = {"drips chunks": b"1\r\n \r\n", "silence": b"", "floods": b" " * 2**20}.get(kind, b" ")
        for _ in range(64) if kind == "floods" else itertools.count():
            if self._stopped.wait(0 if kind == "floods" else 0.05):
                return
            connection.sendall(drop)
            if kind == "silence":
                connection.settimeout(0.05)
                try:
                    if not connection.recv(1):
                        return
                except TimeoutError:
                    pass
