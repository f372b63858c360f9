"""No key leaves: not to another address, not into messages, manifests, rows or reprs; and none comes from elsewhere."""

import base64
import json
import shutil
import socket
import ssl
import subprocess
import threading
import traceback
import warnings

import pytest

import bpo

MESSAGES = [{"role": "user", "content": "hi"}]
ENVIRONMENT = {
    "OPENAI_API_KEY": "sk-of-the-environment",
    "OPENAI_CUSTOM_HEADERS": "Authorization: Bearer sk-of-the-environment\nX-Of: the-environment",
    "OPENAI_ORG_ID": "org-of-the-environment",
    "OPENAI_PROJECT_ID": "project-of-the-environment",
    "OPENAI_BASE_URL": "http://127.0.0.1:9/of-the-environment",
    **dict.fromkeys(("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"), "http://127.0.0.1:9"),
}


@pytest.mark.parametrize("key", ["sk-SECRET1\n", "sk-SECRET1 ", " sk-SECRET1", "sk-SE\tCRET1", "sk-SECRET1\u00e9", ""])
def test_a_key_that_cannot_be_one_is_refused_and_not_shown(key):
    with pytest.raises(ValueError, match="api_key") as caught:
        bpo.ChatServer("http://localhost:1", "m", key)
    assert "SECRET" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "address", ["user:SECRET1@host/v1", "http://user:SECRET1@/v1", "http://user:SECRET1@host/v1 ", "ftp://u:SECRET1@h"]
)
def test_an_address_that_is_none_does_not_show_its_password(address):
    for arguments in ({"base_url": address}, {"base_url": "http://localhost", "proxy": address}):
        with pytest.raises(ValueError, match=r"base_url|proxy") as caught:
            bpo.ChatServer(model="m", **arguments)
        assert "SECRET" not in "".join(traceback.format_exception(caught.value))


def test_a_key_and_a_user_are_not_both_sent():
    with pytest.raises(ValueError, match="either api_key or a user"):
        bpo.ChatServer("http://user:password@localhost", "m", "key")


def test_nothing_of_the_environment_is_sent_or_followed(protocol, monkeypatch, tmp_path):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password of-the-environment\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    for key in (None, "sk-mine"):
        assert bpo.ChatServer(protocol.url, "m", key, max_retries=0).complete(MESSAGES).text == "hello"
    assert protocol.keys == [None, "Bearer sk-mine"]
    assert not any("environment" in str(headers) for headers in protocol.headers)


def test_the_body_is_what_was_asked_for_and_nothing_else(protocol):
    server = bpo.ChatServer(protocol.url, "m", extra_body={"top_k": 3})
    messages = [{"role": "user", "content": "naïve 👩‍🚀\u2028\x00"}]
    server.complete(messages, temperature=0.5, seed=3, tools=[{"type": "function"}], stop=None)
    assert protocol.requests == [
        {
            "model": "m",
            "messages": messages,
            "temperature": 0.5,
            "seed": 3,
            "tools": [{"type": "function"}],
            "top_k": 3,
        }
    ]


@pytest.mark.parametrize("extra_body", [{"model": "n"}, {"messages": []}, {"stream": True}, {"a": float("nan")}, ["a"]])
def test_fields_that_would_not_be_honoured_are_refused(extra_body):
    if extra_body == {"messages": []}:
        extra_body = {"messages": MESSAGES}
    with pytest.raises(ValueError, match="extra_body"):
        bpo.ChatServer("http://localhost", "m", extra_body=extra_body)


def test_secrets_stay_out_of_manifests_rows_messages_and_reprs(protocol, tmp_path):
    basic = base64.b64encode(b"user:PASSWORD").decode()

    def script(request, number):
        """Fails, and repeats all that it was sent."""
        if number % 2:
            return f"reply {number}"
        said = {"error": {"message": f"{protocol.headers[number]} {json.dumps(request)} PASSWORD"}}
        return (400, {}, json.dumps(said))

    protocol.script = script
    url = protocol.url.replace("http://", "http://user:PASSWORD@") + "/v1?api-key=IN-THE-URL&api-version=1"
    extra_body = {"api_key": "IN-THE-BODY", "user": "http://a:IN-A-VALUE@host", "seed": 5}
    server = bpo.ChatServer(url, "m", extra_body=extra_body, concurrency=1, cache=tmp_path / "replies.jsonl")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        rows = bpo.sample_responses(server, ["a", "b"], 2, output=tmp_path / "responses.jsonl", progress=False)
        judge = bpo.Judge(server)
        protocol.script = lambda request, number: "Rating: 5" if number % 2 else script(request, number)
        bpo.score_responses(rows, judge, output=tmp_path / "scores.jsonl", progress=False)
    assert set(protocol.keys) == {f"Basic {basic}"}
    with pytest.raises(bpo.ChatError) as caught:
        protocol.script = lambda request, number: script(request, 0)
        server.complete(MESSAGES)
    seen = [path.read_text() for path in tmp_path.iterdir()] + [str(each.message) for each in said]
    seen += [repr(server), str(server.describe()), str(judge.describe()), repr(vars(server)), server.base_url]
    seen += traceback.format_exception(caught.value)
    text = "\n".join(seen)
    assert len(seen) > 8 and "status 400" in text and "***" in text
    for secret in (basic, "PASSWORD", "IN-THE-URL", "IN-THE-BODY", "IN-A-VALUE"):
        assert secret not in text.replace(repr(extra_body), ""), secret
    # What replies depend on is there.
    assert server.describe()["base_url"] == protocol.url + "/v1?api-key=***&api-version=1"
    assert server.describe()["extra_body"]["seed"] == 5


def test_another_key_is_no_other_request(protocol, tmp_path):
    def ask(key, **fields):
        server = bpo.ChatServer(protocol.url, "m", cache=tmp_path / "c.jsonl", extra_body={"api_key": key, **fields})
        server.complete(MESSAGES)
        return server.n_requests

    assert [ask("one"), ask("two"), ask("two", top_k=1)] == [1, 0, 1]


def test_no_redirect_is_followed(protocol):
    protocol.script = lambda request, number: (307, {"location": f"{protocol.url}/v1/chat/completions?again"})
    with pytest.raises(ValueError, match=r"redirect \(status 307\) to .*again, which is not followed"):
        bpo.ChatServer(protocol.url, "m", "sk-mine").complete(MESSAGES)
    assert len(protocol.requests) == 1


def test_a_proxy_is_one_that_was_named(protocol):
    """It gets its own credentials; the server's key goes through it to the server."""
    received = []

    def serve(listening):
        connection, _ = listening.accept()
        with connection:
            head = connection.recv(65536).decode()
            received.append(head)
            body = json.dumps({"choices": [{"message": {"content": "by proxy"}}]})
            connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, args=(listening,), daemon=True).start()
        proxy = f"http://me:PROXY-PASSWORD@127.0.0.1:{listening.getsockname()[1]}"
        server = bpo.ChatServer("http://server.invalid", "m", "sk-mine", proxy=proxy, max_retries=0)
        assert server.complete(MESSAGES).text == "by proxy"
    assert received[0].startswith("POST http://server.invalid/v1/chat/completions ")
    assert base64.b64encode(b"me:PROXY-PASSWORD").decode() in received[0] and "Bearer sk-mine" in received[0]
    with pytest.raises(ConnectionError, match=r"server\.invalid/v1 cannot be reached") as caught:
        server.complete(MESSAGES)
    assert "PROXY-PASSWORD" not in str(caught.value) + str(server.describe()) + repr(vars(server))


@pytest.fixture
def certificate(tmp_path):
    """A certificate of 127.0.0.1 that nobody trusts, with its key."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    paths = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-out", paths[0], "-keyout", paths[1]]
    subprocess.run([*command, *names], check=True, capture_output=True)
    return paths


def test_certificates_are_those_of_the_system_or_those_named(protocol, certificate, monkeypatch, tmp_path):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    protocol.socket = context.wrap_socket(protocol.socket, server_side=True)
    protocol.handle_error = lambda *arguments: None  # of handshakes that the client breaks off
    url = protocol.url.replace("http://", "https://")
    # The environment neither vouches for a server nor has its traffic written down.
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys.log"))
    with pytest.raises(ConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
        bpo.ChatServer(url, "m", "sk-mine", max_retries=0).complete(MESSAGES)
    assert not protocol.keys
    assert bpo.ChatServer(url, "m", "sk-mine", ca_file=certificate[0], max_retries=0).complete(MESSAGES).text == "hello"
    assert not (tmp_path / "keys.log").exists()
    with pytest.raises(OSError, match=r"nowhere\.pem"):
        bpo.ChatServer(url, "m", ca_file=tmp_path / "nowhere.pem")
