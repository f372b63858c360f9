"""Secrets are told by names, addresses and looks, and what replies depend on stays."""

import json

import pytest

from bpo.system.secrets import HIDDEN, Secrets, without_secrets


@pytest.mark.parametrize(
    "name",
    ["api_key", "apiKey", "API-KEY", "x-api-key", "token", "access_token", "password", "clientSecret", "Authorization"],
)
def test_fields_that_hold_secrets_are_told_by_a_word_of_their_name(name):
    shown, secrets = without_secrets({"headers": [{name: "hunter2!"}]})
    assert shown == {"headers": [{name: HIDDEN}]} and secrets == ["hunter2!"]


def test_what_replies_depend_on_stays():
    body = {
        "max_tokens": 5,
        "max_completion_tokens": None,
        "stop_token_ids": [1, 2],
        "eos_token": "</s>",
        "stop": ["\n\n"],
        "tokenizer": "mine",
        "monkey": "business",
        "authors": ["a"],
        "add_special_tokens": True,
        "url": "https://host/v1?api-version=2026-01-01",
        "text": "the password is in the basic rules",
    }
    assert without_secrets(body) == (body, [])


def test_all_below_a_field_of_credentials_is_hidden():
    shown, secrets = without_secrets({"credentials": {"user": "me", "pin": 1234, "ttl": None, "on": True}})
    assert shown == {"credentials": {"user": HIDDEN, "pin": HIDDEN, "ttl": None, "on": True}}
    assert secrets == ["me", "1234"]


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("http://me:pa55@host/v1", "me:pa55"),
        ("https://host/?v=1&sig=abc%2B", "abc%2B"),
        ("said: Bearer abc.def", "abc.def"),
        ("Basic dXNlcjpwYXNz", "dXNlcjpwYXNz"),
        ("key sk-proj-abc_123456", "sk-proj-abc_123456"),
        ("hf_abcdefghijklmnopqrst", "hf_abcdefghijklmnopqrst"),
        ("eyJhbGciOiJI.eyJzdWIiOiIx.SflKxw", "eyJhbGciOiJI.eyJzdWIiOiIx.SflKxw"),
    ],
)
def test_secrets_are_told_by_where_they_stand_and_how_they_look(text, secret):
    assert without_secrets({"note": text}) == ({"note": text.replace(secret, HIDDEN)}, [secret])


def test_known_secrets_are_hidden_in_all_forms():
    key = 'a"b\\c/d+e=12'
    secrets = Secrets([key, "ab"])
    for form in (key, key.upper(), json.dumps(key), "a%22b%5Cc%2Fd%2Be%3D12"):
        hidden = secrets.hide(f"<{form}> ab")
        assert HIDDEN in hidden and "12" not in hidden and hidden.endswith("> ab")
    assert key not in repr(secrets)


def test_only_what_is_no_word_is_told_by_a_text():
    secrets = Secrets(["PASSWORD", "short1", "sk-12345678"])
    assert secrets.are_told_by("it is sk-12345678.") and not secrets.are_told_by("a PASSWORD, short1")


def test_hiding_takes_time_in_proportion_to_the_text():
    """Texts on which a careless expression takes hours."""
    for text in ("eyJ-" * 10_000, "?" * 40_000, "&a" * 20_000, "://" * 10_000, "bearer " * 5000):
        Secrets(["sk-12345678"]).hide(text)
