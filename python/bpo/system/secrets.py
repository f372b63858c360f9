"""Secrets in addresses, settings and what servers say: kept out of all that is written or shown."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote, unquote

HIDDEN = "***"
"""What stands where a secret was."""

# Fields whose text is a secret, told by a word of their name, and those where nothing below is shown.
_TEXT_IS_SECRET = frozenset(
    {"accesskey", "accesstoken", "apikey", "authtoken", "bearer", "key", "secretkey", "sig", "signature", "token"}
)
_ALL_IS_SECRET = frozenset(
    {"auth", "authorization", "cookie", "cookies", "credential", "credentials"}
    | {"passphrase", "passwd", "password", "pwd", "secret", "secrets"}
)
# Tokens of a vocabulary: replies depend on them.
_VOCABULARY = frozenset({"bos", "cls", "end", "eos", "image", "mask", "pad", "sep", "special", "start", "stop", "unk"})
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")

# What looks like a secret wherever it stands; the last group is the secret.
_ADDRESS = re.compile(r"(?<=://)()([^/?#\s@\"']+)(?=@)")
_PARAMETER = re.compile(r"([?&]([^=?&#\s]+)=)([^&#\s\"']+)")
_LOOKS = re.compile(
    r"()(\b(?:sk|rk|gsk|nvapi|glpat|xox[abp])-[\w-]{6,}"
    r"|\b(?:hf|ghp|gho|ghs|ghu|gsk|github_pat)_\w{16,}"
    r"|\bAKIA[0-9A-Z]{12,}|\bAIza[\w-]{20,}|\beyJ[\w-]{8,2000}\.[\w-]{2,4000}\.[\w-]*"
    r"|(?<=bearer )[\w.~+/=-]{4,}|(?<=basic )[\w+/=-]{8,})",
    re.IGNORECASE,
)


def without_secrets(value: Any) -> tuple[Any, list[str]]:
    """Takes the secrets out of settings.

    They are told by the names of fields (``api_key``, ``password``, …), as the credentials or parameters of an address,
    and by their look (``sk-…``, ``Bearer …``).

    Args:
        value: JSON.

    Returns:
        The same with :data:`HIDDEN` in their place, and the secrets.

    Example:
        >>> without_secrets({"max_tokens": 5, "api_key": "s3cret", "proxy": "http://me:pw@host/?sig=ab&v=1"})
        ({'max_tokens': 5, 'api_key': '***', 'proxy': 'http://***@host/?sig=***&v=1'}, ['s3cret', 'me:pw', 'ab'])
    """
    found: list[str] = []
    return _shown(value, found, texts=False, everything=False), found


def _shown(value: Any, found: list[str], *, texts: bool, everything: bool) -> Any:
    if isinstance(value, Mapping):
        return {
            name: _shown(item, found, texts=_named(name, _TEXT_IS_SECRET), everything=everything or _is_closed(name))
            for name, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_shown(item, found, texts=texts, everything=everything) for item in value]
    if isinstance(value, str):
        if value and (texts or everything):
            found.append(value)
            return HIDDEN
        return _hide_looks(value, found)
    if everything and value is not None and not isinstance(value, bool):
        found.append(str(value))
        return HIDDEN
    return value


def _words(name: Any) -> set[str]:
    return {word.lower() for word in _WORD.findall(str(name))}


def _named(name: Any, secret: frozenset[str]) -> bool:
    words = _words(name)
    return bool(words & secret) and not words & _VOCABULARY


def _is_closed(name: Any) -> bool:
    return bool(_words(name) & _ALL_IS_SECRET)


def _hide_looks(text: str, found: list[str]) -> str:
    def hide(match: re.Match[str]) -> str:
        found.append(match[match.re.groups])
        return match[1] + HIDDEN

    def hide_parameter(match: re.Match[str]) -> str:
        name = unquote(match[2])
        return hide(match) if _named(name, _TEXT_IS_SECRET | {"code"}) or _is_closed(name) else match[0]

    return _LOOKS.sub(hide, _PARAMETER.sub(hide_parameter, _ADDRESS.sub(hide, text)))


class Secrets:
    """The secrets of a connection, which know how to stay out of texts.

    Args:
        values: The secrets; those of fewer than four characters cannot be told from other text, and are left out.
    """

    def __init__(self, values: Iterable[str]) -> None:
        values = {value for value in values if len(value) >= 4}
        # As they stand in JSON or in an address, too.
        forms = values | {json.dumps(value)[1:-1] for value in values} | {quote(value, safe="") for value in values}
        longest_first = sorted(forms, key=lambda form: (-len(form), form))
        self._known = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)", re.IGNORECASE)
        # A word alone ("password", "EMPTY") may stand in any text; what is more than that is no coincidence.
        self._telling = [value for value in values if len(value) >= 8 and not value.isalpha()]

    def __repr__(self) -> str:
        return f"Secrets({HIDDEN})"

    def hide(self, text: str) -> str:
        """Returns a text with :data:`HIDDEN` in place of each secret, and of what looks like one."""
        return _hide_looks(self._known.sub(HIDDEN, text), [])

    def are_told_by(self, text: str) -> bool:
        """Whether a text repeats one, beyond coincidence."""
        return any(value in text for value in self._telling)
