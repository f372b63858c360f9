"""A server that misbehaves at random: what it answers soundly is finished, all else is counted, and nothing leaks.

BPO_TORTURE=N sends 10·N requests in place of 60.
"""

import json
import os
import re
import threading
import warnings
from collections import Counter

import pytest

import bpo
from hostile import SOUND, UNSOUND, HostileServer

KEY = "sk-THIS-1s-to-be-seen-nowhere"
N_REQUESTS = 10 * int(os.environ.get("BPO_TORTURE", "6"))
# A sound reply comes at once, three times over; on a busy machine that may take a while.
TIMEOUT = 6.0 if N_REQUESTS < 200 else 30.0
LIMITS = {"timeout": TIMEOUT, "max_retries": 2, "max_retry_after": 60, "concurrency": 64}


def finishes(work, seconds=1800):
    """Runs in a thread, so that what hangs is a failure and not a test without end."""
    results = []

    def run():
        try:
            results.append(work())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert results, "it hangs"
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


@pytest.fixture(autouse=True)
def misleading_environment(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)


def test_each_sound_reply_is_a_response_and_all_else_is_counted(tmp_path):
    prompts = [f"prompt {number}" for number in range(N_REQUESTS // 2)]
    output, cache = tmp_path / "responses.jsonl", tmp_path / "replies.jsonl"
    with (
        HostileServer(0, lambda message: f"reply to {message}", lambda message: int(message.split()[1])) as server,
        warnings.catch_warnings(record=True) as said,
    ):
        warnings.simplefilter("always")
        chat = bpo.ChatServer(server.url, "m", KEY, cache=cache, **LIMITS)
        sound = {prompt: server.kind(number) in SOUND for number, prompt in enumerate(prompts)}
        assert 0 < sum(sound.values()) < len(prompts)
        dataset = finishes(lambda: bpo.sample_responses(chat, prompts, 1, output=output, progress=False))
        assert [row["prompt"][0]["content"] for row in dataset] == prompts
        for prompt, row in zip(prompts, dataset, strict=True):
            assert row["responses"] == ([f"reply to {prompt}"] if sound[prompt] else []), prompt
            assert row["dropped"]["failed"] == (not sound[prompt])
        failures = [re.search(r"first failure: row (\d+): ", str(each.message)) for each in said]
        assert any(found and not sound[prompts[int(found[1])]] for found in failures)
        # What failed is asked for again, and nothing else; then the server is well.
        server.benign = True
        n_before = len(server.seen)
        dataset = finishes(lambda: bpo.sample_responses(chat, prompts, 1, output=output, progress=False))
        assert dataset["responses"][:] == [[f"reply to {prompt}"] for prompt in prompts]
        again = Counter(message for message, _ in server.seen[n_before:])
        assert again == {prompt: 1 for prompt in prompts if not sound[prompt]}
        assert not server.strayed and all(headers["authorization"] == f"Bearer {KEY}" for _, headers in server.seen)
    written = "".join(path.read_text() for path in tmp_path.iterdir()) + "".join(str(each.message) for each in said)
    assert KEY not in written and len(list(tmp_path.iterdir())) == 3


def test_each_sound_verdict_is_a_score_and_all_else_has_its_reason(tmp_path):
    rows = [{"prompt": f"question {number}", "responses": ["one", "other"]} for number in range(N_REQUESTS // 4)]
    output = tmp_path / "scores.jsonl"

    def asked(message):
        question, text = re.search(r"question (\d+)\n.*\n(one|other)\n", message, re.DOTALL).groups()
        return int(question), text

    def number_of(message):
        """Goes on from the numbers of the other test."""
        question, text = asked(message)
        return N_REQUESTS // 2 + 2 * question + (text == "other")

    with HostileServer(0, lambda message: f"So be it.\nRating: {1 + asked(message)[0] % 10}", number_of) as server:
        judge = bpo.Judge(bpo.ChatServer(server.url, "m", KEY, **LIMITS))
        with pytest.warns(UserWarning, match="responses have no score"):
            dataset = finishes(lambda: bpo.score_responses(rows, judge, output=output, progress=False))
        kinds = Counter()
        for number, row in enumerate(dataset):
            for text, score, reason in zip(row["responses"], row["scores"], row["score_errors"], strict=True):
                draw = server.kind(number_of(f"question {number}\n\n{text}\n"))
                kinds[draw] += 1
                if draw in SOUND:
                    assert (score, reason) == (1 + number % 10, None), draw
                else:
                    assert score is None and re.search(UNSOUND[draw][1], reason), draw
        n_bad = sum(count for kind, count in kinds.items() if kind in UNSOUND)
        assert judge.counts["failed"] == n_bad and judge.counts["replies"] == 2 * len(rows) - n_bad
        assert not server.strayed
    print(json.dumps(kinds, indent=0))
    assert KEY not in output.read_text() and "\\u001b" not in output.read_text()
