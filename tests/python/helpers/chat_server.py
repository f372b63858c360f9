"""A server of chat completions on loopback that answers by a script."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ProtocolServer(ThreadingHTTPServer):
    """Speaks the protocol of chat completions; ``script`` maps (request, number of it) to what is answered."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script = lambda request, number: "hello"
        self.requests, self.times, self.keys, self.headers = [], [], [], []
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        server, body = self.server, self.rfile.read(int(self.headers["content-length"]))
        with server.lock:
            number = len(server.requests)
            server.requests.append(json.loads(body))
            server.times.append(time.monotonic())
            server.keys.append(self.headers["authorization"])
            server.headers.append(dict(self.headers))
        answer = (
            server.script(server.requests[number], number)
            if self.path.split("?")[0] == "/v1/chat/completions"
            else (404, {})
        )
        status, headers, payload = 200, {}, answer
        if isinstance(answer, tuple) and answer[0] is None:
            self.close_connection = True  # hangs up
            return
        if isinstance(answer, tuple):
            status, headers = answer[:2]
            payload = answer[2] if len(answer) > 2 else json.dumps({"error": {"message": f"provoked {status}"}})
        else:
            finish = "stop"
            if isinstance(answer, dict):
                payload, finish = answer["text"], answer["finish_reason"]
            choice = {"index": 0, "message": {"role": "assistant", "content": payload}, "finish_reason": finish}
            payload = json.dumps({"id": "x", "object": "chat.completion", "model": "m", "choices": [choice]})
        data = payload.encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", "content-length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass
