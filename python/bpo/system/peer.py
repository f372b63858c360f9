"""An address that requests are posted to: reached by what was given, and by nothing of the environment."""

from __future__ import annotations

import base64
import os
import platform
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from bpo.system.optional import DISTRIBUTION
from bpo.system.secrets import without_secrets

if TYPE_CHECKING:
    import httpx2

_MOST_BYTES = 16 * 2**20  # of what comes back
_MOST_SECONDS_TO_CONNECT = 30.0
# Where systems keep their certificates, if OpenSSL was compiled for another place.
_CA_FILES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/pki/tls/cert.pem",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)


class LostConnectionError(Exception):
    """A request that was not answered on a connection that was there, or not in a way that can be read."""


class Peer:
    """Where requests go, and how.

    They go through the transport of httpx2, below its client: that knows no redirects, cookies or ``.netrc``.

    Args:
        address: Begins with http:// or https://, and may hold a user and a password.
        default_path: Of an address without a path.
        endpoint: What follows the path of the address in requests.
        api_key: Goes into each request.
        timeout: Seconds after which a connection is given up, if these are fewer than 30. The caller cuts a request.
        proxy: Address of an HTTP proxy, with a user and a password where it needs them.
        ca_file: PEM file of the certificates to trust, in place of those of the system.

    Attributes:
        shown: The address with its path, without secrets.
        secrets: What must not be shown of address, key and proxy.

    Raises:
        ImportError: httpx2 is not installed.
        ValueError: No such address or key can be.
        OSError: A ``ca_file`` that cannot be read.
    """

    def __init__(
        self,
        address: str,
        default_path: str,
        endpoint: str,
        api_key: str | None = None,
        *,
        timeout: float,
        proxy: str | None = None,
        ca_file: str | os.PathLike[str] | None = None,
    ) -> None:
        try:
            import httpx2
        except ImportError:
            raise ImportError(f"Servers need the package httpx2: pip install '{DISTRIBUTION}[judge]'.") from None

        url, user = _parsed(address, "base_url")
        if url.path == "/":
            url = url.copy_with(path=default_path)
        self.shown, secrets = without_secrets(str(url))
        self._url = url.copy_with(path=url.path + endpoint)
        # Its repr hides the value of Authorization. Nothing is to be compressed, so that what is read has a bound.
        self._headers = httpx2.Headers(
            {"Content-Type": "application/json", "Accept-Encoding": "identity", "Connection": "close"}
        )
        authorization = _authorization(api_key, user)
        if authorization is not None:
            self._headers["Authorization"] = authorization
        self._timeouts = {"connect": min(timeout, _MOST_SECONDS_TO_CONNECT)}
        proxy_url, proxy_user = (None, None) if proxy is None else _parsed(proxy, "proxy")
        self._proxy = None if proxy_url is None else httpx2.Proxy(proxy_url, auth=proxy_user)
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if ca_file is not None:
            try:
                self._tls.load_verify_locations(ca_file)
            except OSError as error:
                raise OSError(f"ca_file: {ca_file} holds no certificates that can be read: {error}") from None
        elif url.scheme == "https":
            self._tls = _system_certificates()
        self.secrets = [*([] if api_key is None else [api_key]), *_of_user(user), *_of_user(proxy_user), *secrets]

    def transport(self) -> httpx2.AsyncHTTPTransport:
        """Returns what carries requests, for one event loop."""
        import httpx2

        # No connection is used twice: what a server sends too much would be taken for the next answer.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
        return httpx2.AsyncHTTPTransport(verify=self._tls, trust_env=False, limits=limits, proxy=self._proxy)

    async def post(self, transport: httpx2.AsyncHTTPTransport, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        """Sends a request of JSON and returns status, headers and body of what comes back.

        Raises:
            ConnectionError: There is no connection.
            LostConnectionError: It broke off, or what came cannot be read.
        """
        import httpx2

        request = httpx2.Request(
            "POST", self._url, headers=self._headers, content=body, extensions={"timeout": self._timeouts}
        )
        try:
            response = await transport.handle_async_request(request)
            try:
                data = await _body(response)
            finally:
                await response.aclose()
        except LostConnectionError:
            raise
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
            raise ConnectionError(str(error) or type(error).__name__) from None
        except Exception as error:  # of HTTP or of the connection; whatever it is, there is no answer
            raise LostConnectionError(str(error) or type(error).__name__) from None
        return response.status_code, response.headers, data


async def _body(response: httpx2.Response) -> bytes:
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise LostConnectionError("what came is compressed, which was not asked for")
    data = bytearray()
    async for part in response.aiter_raw():
        data += part
        if len(data) > _MOST_BYTES:
            raise LostConnectionError(f"more than {_MOST_BYTES // 2**20} MiB came")
    return bytes(data)


def _system_certificates() -> ssl.SSLContext:
    """Returns a context that trusts what the system does, and knows nothing of SSL_CERT_FILE and SSL_CERT_DIR.

    ``ssl.create_default_context`` and, for OpenSSL, truststore read these (and SSLKEYLOGFILE).
    """
    import truststore

    if platform.system() in ("Darwin", "Windows"):
        return truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    compiled_in = ssl.get_default_verify_paths()
    file = next((file for file in (compiled_in.openssl_cafile, *_CA_FILES) if Path(file).is_file()), None)
    folder = compiled_in.openssl_capath if Path(compiled_in.openssl_capath).is_dir() else None
    if file is None and folder is None:
        raise FileNotFoundError("There are no certificates of the system; name those to trust as ca_file.")
    context.load_verify_locations(file, folder)
    return context


def _parsed(address: str, field: str) -> tuple[httpx2.URL, tuple[str, str] | None]:
    """Returns an address without user and password and without a slash at its end, and these two."""
    import httpx2

    address = str(address)
    shown = "what was given (not shown: it holds a user or a password)" if "@" in address else repr(address)
    if not address.startswith(("http://", "https://")):
        raise ValueError(f"{field} must begin with http:// or https://, got {shown}.")
    try:
        url = httpx2.URL(address)
    except (httpx2.InvalidURL, ValueError):
        url = None
    if url is None or not url.host or url.fragment or not address.isprintable() or " " in address:
        raise ValueError(f"{field} is no address of a server: {shown}.")
    user = (unquote(url.username), unquote(url.password)) if url.userinfo else None
    return url.copy_with(userinfo=b"", path=url.path.rstrip("/") or "/"), user


def _authorization(api_key: str | None, user: tuple[str, str] | None) -> str | None:
    """Returns the value of the header that a key, or user and password, go into."""
    if api_key is None:
        return None if user is None else f"Basic {_basic(user)}"
    if user is not None:
        raise ValueError("Give either api_key or a user in base_url: they go into the same header.")
    if not isinstance(api_key, str):
        raise ValueError(f"api_key must be text, not {type(api_key).__name__}.")
    if not api_key or not all("!" <= character <= "~" for character in api_key):
        raise ValueError(
            "api_key (not shown here) is empty, or holds white space or another character that no key has; one that "
            "was read from a file may end with a line feed."
        )
    return f"Bearer {api_key}"


def _basic(user: tuple[str, str]) -> str:
    return base64.b64encode(":".join(user).encode()).decode()


def _of_user(user: tuple[str, str] | None) -> list[str]:
    """Returns what must not be shown; a user without a password is a key itself."""
    return [] if user is None else [_basic(user), ":".join(user), user[1] or user[0]]
