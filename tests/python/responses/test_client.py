"""Servers: what goes wrong with them, provoked on loopback, and a real one, `transformers serve` with SmolLM2."""

import asyncio
import collections
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest

import bpo
from bpo.cli.main import main
from bpo.responses.judge import Judge, read_rating, read_winner

PROMPTS = ["one", "two", "three"]
ROWS = [{"prompt": prompt, "responses": [f"{prompt} cat", f"{prompt} dog dog", f"{prompt} a"]} for prompt in PROMPTS]


def user_text(request):
    return request["messages"][-1]["content"]


def ask(server, text="hi", **settings):
    return server.complete([{"role": "user", "content": text}], **settings)


def score(rows, scorer, **settings):
    return bpo.score_responses(rows, scorer, progress=False, **settings)


def test_what_is_likely_to_pass_is_tried_again(protocol):
    answers = [(429, {"retry-after-ms": "120"}), (503, {}), (500, {"retry-after": "0.1"})]
    protocol.script = lambda request, number: answers[number] if number < 3 else "hello"
    server = bpo.ChatServer(protocol.url, "m", api_key="secret")
    assert ask(server, temperature=0.5, chat_template_kwargs={"thinking": False}).text == "hello"
    assert server.n_requests == len(protocol.requests) == 4
    assert protocol.times[1] - protocol.times[0] >= 0.12 and protocol.times[3] - protocol.times[2] >= 0.1
    assert protocol.times[2] - protocol.times[1] >= 0.3  # half a second, less up to a quarter of jitter
    assert protocol.requests[0]["temperature"] == 0.5 and protocol.requests[0]["chat_template_kwargs"]
    assert set(protocol.keys) == {"Bearer secret"} and "secret" not in repr(server) + str(server.describe())


def test_fields_of_every_request_go_before_others_and_none_takes_one_out(protocol):
    extra = {"max_tokens": None, "max_completion_tokens": 5, "temperature": 0.3}
    ask(bpo.ChatServer(protocol.url, "m", extra_body=extra), max_tokens=9, temperature=1.0, top_p=0.5)
    [request] = protocol.requests
    assert {name: value for name, value in request.items() if name not in ("model", "messages")} == {
        "max_completion_tokens": 5,
        "temperature": 0.3,
        "top_p": 0.5,
    }


def test_interrupted_command_ends_at_once_and_keeps_what_was_finished(protocol, tmp_path):
    """Ctrl-C while replies are awaited: the threads that wait for them do not hold the program."""
    hanging, held = threading.Event(), threading.Event()

    def script(request, number):
        if user_text(request) != "one":
            hanging.set()
            held.wait(180)
        return f"reply {number}"

    protocol.script = script
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "responses.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    arguments = ["sample", protocol.url, str(prompts), "--model", "m", "--output", str(output), "--concurrency", "2"]
    process = subprocess.Popen([sys.executable, "-m", "bpo", *arguments], stderr=subprocess.PIPE, text=True)
    try:
        assert hanging.wait(120)
        while not (output.exists() and output.read_bytes().endswith(b"\n")):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=90)
    finally:
        held.set()
        process.kill()
    assert process.returncode == 130 and "the same command goes on from there" in errors
    assert len(output.read_text().splitlines()) == 1 and "Traceback" not in errors
    assert main(arguments) == 0
    assert [json.loads(line)["prompt"][0]["content"] for line in output.read_text().splitlines()] == PROMPTS


def test_failures_are_errors_of_one_request_or_of_the_server(protocol, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "not for this server")
    server = bpo.ChatServer(protocol.url, "m", max_retries=0)
    slow = threading.Event()
    for answer, message in (
        ((400, {}), "status 400: .*provoked 400"),
        ((500, {}), "status 500"),
        ((200, {"content-type": "text/html"}, "<html>"), "cannot be read: <html>"),
        ((200, {}, "{not json"), "cannot be read"),
        ((200, {}, '{"choices": []}'), "no chat completion"),
    ):
        protocol.script = lambda request, number, answer=answer: answer
        with pytest.raises(bpo.ChatError, match=message):
            ask(server)
    protocol.script = lambda request, number: slow.wait(60) and "late"
    with pytest.raises(bpo.ChatError, match=r"no reply within 0\.5 s"):
        ask(bpo.ChatServer(protocol.url, "m", max_retries=0, timeout=0.5))
    slow.set()
    for status, error, message in (
        (401, PermissionError, "does not accept the key"),
        (403, PermissionError, "does not accept the key"),
        (404, ValueError, "no model 'm'"),
    ):
        protocol.script = lambda request, number, status=status: (status, {})
        with pytest.raises(error, match=message):
            ask(server)
    assert set(protocol.keys) == {None}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ConnectionError, match="cannot be reached"):
        ask(bpo.ChatServer(url, "m", max_retries=0))
    for settings in ({"concurrency": 0}, {"requests_per_minute": 0}, {"timeout": 0}, {"max_retries": -1}):
        with pytest.raises(ValueError, match="must be"):
            bpo.ChatServer(url, "m", **settings)
    with pytest.raises(ValueError, match="http://"):
        bpo.ChatServer("localhost:8000", "m")


def test_requests_keep_to_the_limit_and_overlap(protocol):
    waiting = threading.Barrier(4, timeout=60)

    def script(request, number):
        waiting.wait()  # passes only when four are there at a time
        return user_text(request)

    protocol.script = script
    requests = [{"messages": [{"role": "user", "content": str(number)}]} for number in range(8)]
    replies = dict(bpo.ChatServer(protocol.url, "m", concurrency=4).map(requests))
    assert {index: reply.text for index, reply in replies.items()} == {number: str(number) for number in range(8)}
    protocol.script = lambda request, number: (429, {"retry-after-ms": "1"}) if number == 8 else "hello"
    limited = bpo.ChatServer(protocol.url, "m", concurrency=4, requests_per_minute=60 / 0.05)
    start = time.monotonic()
    assert len(list(limited.map(requests[:5]))) == 5 and limited.n_requests == 6
    # Six attempts, the retry among them, so five intervals at least.
    assert time.monotonic() - start >= 5 * 0.05


def test_map_reads_no_further_ahead_than_needed_and_gives_up_with_the_server(protocol):
    taken = []

    def requests():
        for number in range(1000):
            taken.append(number)
            yield {"messages": [{"role": "user", "content": str(number)}]}

    server = bpo.ChatServer(protocol.url, "m", concurrency=2)
    protocol.script = lambda request, number: (401, {}) if number >= 20 else "hello"
    replies = []
    with pytest.raises(PermissionError):
        replies += server.map(requests())
    assert 35 <= len(replies) <= 37 and len(taken) < 44
    # One such answer among others is a failure of its request.
    taken.clear()
    n_before = len(protocol.requests)
    protocol.script = lambda request, number: (401, {}) if number == n_before + 20 else "hello"
    replies = dict(server.map(itertools.islice(requests(), 60)))
    [failed] = [reply for reply in replies.values() if isinstance(reply, bpo.ChatError)]
    assert len(replies) == 60 and "does not accept the key (status 401): provoked 401" in str(failed)


def test_cache_answers_the_same_request_and_survives_a_kill(protocol, tmp_path):
    cache = tmp_path / "replies.jsonl"
    protocol.script = lambda request, number: f"reply {number}"
    first = bpo.ChatServer(protocol.url, "m", cache=cache)
    replies = [ask(first, text, seed=seed).text for text, seed in (("a", 0), ("a", 1), ("b", 0))]
    assert len(set(replies)) == 3 and ask(first, "a", seed=0).text == replies[0]
    assert (first.n_requests, first.n_cached) == (3, 1)
    # Killed while it wrote its last line; then another process appends.
    cache.write_bytes(cache.read_bytes()[:-9])
    second = bpo.ChatServer(protocol.url, "m", cache=cache)
    assert [ask(second, "a", seed=seed).text for seed in (0, 1)] == replies[:2] and second.n_requests == 0
    assert ask(second, "b", seed=0).text == "reply 3"
    third = bpo.ChatServer(protocol.url, "m", cache=cache)
    assert ask(third, "b", seed=0).text == "reply 3" and third.n_requests == 0
    for other in (
        bpo.ChatServer(protocol.url, "n", cache=cache),
        bpo.ChatServer(protocol.url + "/v1/", "m", cache=cache),
    ):
        ask(other, "a", seed=0)
    assert other.base_url == third.base_url and (other.n_requests, other.n_cached) == (0, 1)
    assert len(protocol.requests) == 5


def test_sampling_from_a_server_drops_and_counts(protocol, tmp_path):
    kinds = [
        "fine",
        {"text": "cut in the mid", "finish_reason": "length"},
        "I'm sorry, but I can't help with that.",
        "fine",
        "",
        {"text": "filtered", "finish_reason": "content_filter"},
        "fine too",
        (400, {}),
    ]
    seen = collections.Counter()
    lock = threading.Lock()

    def script(request, number):
        with lock:
            seen[user_text(request)] += 1
            return kinds[(seen[user_text(request)] - 1) % 8]

    protocol.script = script
    server = bpo.ChatServer(protocol.url, "m", concurrency=1)
    output = tmp_path / "responses.jsonl"
    with pytest.warns(UserWarning, match=r"3 requests failed.*first failure: row 0: status 400"):
        dataset = bpo.sample_responses(server, PROMPTS, 8, output=output, progress=False)
    assert dataset[0]["prompt"] == [{"role": "user", "content": "one"}]
    assert dataset["responses"][:] == [["fine", "fine too"]] * 3
    assert dataset[0]["dropped"] == {"empty": 1, "truncated": 1, "refusal": 2, "duplicate": 1, "failed": 1}
    seeds = [request["seed"] for request in protocol.requests]
    assert len(set(seeds)) == 24 and all(0 <= seed < 2**31 for seed in seeds)
    assert {(request["temperature"], request["top_p"], request["max_tokens"]) for request in protocol.requests} == {
        (1.0, 0.95, 512)
    }
    # What failed is sampled again, with the same seeds.
    kinds[7] = "at last"
    again = bpo.sample_responses(server, PROMPTS, 8, output=output, progress=False)
    assert again[2]["responses"] == ["fine", "fine too", "at last"] and again[2]["dropped"]["failed"] == 0
    assert [request["seed"] for request in protocol.requests[24:]] == seeds
    bpo.sample_responses(server, PROMPTS, 8, output=output, progress=False)
    assert len(protocol.requests) == 48


def test_ratings_are_read_strictly_and_failures_kept(protocol, tmp_path):
    ratings = {"cat": "Right.\nRating: 7", "dog dog": "I would say about 9.", "a": '{"rating": 3}'}

    def script(request, number):
        response = re.search(r"<(response_\w+)>\n(.*)\n</\1>", user_text(request))[2]
        if response == "two cat":
            return (400, {})
        if response == "three a":
            return {"text": "Rating: 7", "finish_reason": "length"}
        return ratings[response.split(" ", 1)[1]]

    protocol.script = script
    cache = tmp_path / "replies.jsonl"
    judge = bpo.Judge(bpo.ChatServer(protocol.url, "m", cache=cache))
    with pytest.warns(UserWarning, match="5 of 9 responses have no score"):
        dataset = score(ROWS, judge, output=tmp_path / "scores.jsonl")
    assert dataset["scores"][:] == [[7, None, 3], [None, None, 3], [7, None, None]]
    assert "ends with no rating: 'I would say about 9.'" in dataset["score_errors"][0][1]
    assert "status 400" in dataset["score_errors"][1][0] and "cut at 512" in dataset["score_errors"][2][2]
    assert judge.counts == {"replies": 8, "failed": 1, "unreadable": 4}
    # Once more: replies are in the cache, and of the requests only the one that failed goes out.
    again = bpo.Judge(bpo.ChatServer(protocol.url, "m", cache=cache))
    with pytest.warns(UserWarning):
        score(ROWS, again, output=tmp_path / "scores.jsonl")
    assert (again.server.n_requests, again.server.n_cached) == (1, 4)
    with pytest.raises(ValueError, match=r"other settings: scorer\.criteria"):
        score(ROWS, bpo.Judge(judge.server, criteria="Be brief."), output=tmp_path / "scores.jsonl")


@pytest.mark.parametrize(
    "reply", ["Rating: 11", "Rating: 0.5", "Rating: seven", "Rating: 7\nor 8", "7", "", '{"score": 7}']
)
def test_other_replies_are_no_ratings(reply):
    with pytest.raises(ValueError, match="the judge's"):
        read_rating(reply)


def test_thoughts_are_no_verdict():
    assert read_rating("<think>\nRating: 2\n</think>\n\n**Rating: [[9]]**") == 9
    assert read_winner('```json\n{"winner": "B"}\n```') == 0
    with pytest.raises(ValueError, match="none of A, B and tie"):
        read_winner("Winner: both")


def sides(request):
    """The two responses of a comparison, as the judge is told to find them."""
    mark = re.search(r"tags that end in (\w+)", user_text(request))[1]
    sides = rf"<response_A_{mark}>\n(.*)\n</response_A_{mark}>.*<response_B_{mark}>\n(.*)\n</response_B_{mark}>"
    return re.search(sides, user_text(request), re.S)


def test_a_judge_that_always_prefers_the_first_gives_ties(protocol):
    protocol.script = lambda request, number: "It comes first.\nWinner: A"
    judge = bpo.Judge(bpo.ChatServer(protocol.url, "m"), "pairwise")
    dataset = score(ROWS, judge)
    assert dataset["scores"][:] == [[0.5] * 3] * 3
    assert judge.counts == {"replies": 18, "comparisons": 9, "ties": 9, "disagreements": 9}
    assert bpo.describe_responses(dataset).n_tied == 3
    asked = {sides(request).groups() for request in protocol.requests}
    assert len(asked) == 18 and all(pair[::-1] in asked for pair in asked)


def longer(request):
    first, second = (len(side) for side in sides(request).groups())
    return f"Winner: {'tie' if first == second else 'A' if first > second else 'B'}"


def test_win_shares_of_a_consistent_judge(protocol):
    protocol.script = lambda request, number: longer(request)
    server = bpo.ChatServer(protocol.url, "m")
    rows = [
        {**ROWS[0], "scores": [1.0, None, 1.0]},
        {"prompt": "x", "responses": ["aa", "bb", "c"]},
        {"prompt": "y", "responses": ["a"]},
    ]
    with pytest.warns(UserWarning, match="there is no response to compare it with"):
        dataset = score(rows, bpo.Judge(server, "pairwise"))
    assert dataset["scores"][:] == [[0.5, 1.0, 0.0], [0.75, 0.75, 0.0], [None]]
    n_requests = len(protocol.requests)
    baseline = score(ROWS[:1], bpo.Judge(server, "pairwise", baseline=0))
    assert baseline["scores"][0] == [0.5, 1.0, 0.0] and len(protocol.requests) - n_requests == 4


def test_a_comparison_that_failed_scores_neither(protocol):
    def script(request, number):
        return "Hm." if sides(request).groups() == ("one a", "one cat") else longer(request)

    protocol.script = script
    with pytest.warns(UserWarning, match="2 of 3 responses have no score"):
        dataset = score(ROWS[:1], bpo.Judge(bpo.ChatServer(protocol.url, "m"), "pairwise"))
    assert dataset["scores"][0] == [None, 1.0, None]
    assert "ends with no winner: 'Hm.'" in dataset["score_errors"][0][0]


def test_interrupted_judging_goes_on(protocol, tmp_path):
    protocol.script = lambda request, number: (401, {}) if number >= 9 else longer(request)
    server = bpo.ChatServer(protocol.url, "m", concurrency=1)
    output = tmp_path / "scores.jsonl"
    rows = [{**row, "prompt": f"{row['prompt']} {number}"} for number in range(2) for row in ROWS]
    with pytest.raises(PermissionError):
        score(rows, bpo.Judge(server, "pairwise"), output=output)
    assert next(json.loads(line)["scores"] for line in output.read_text().splitlines()) == [0.5, 1.0, 0.0]
    n_before = len(protocol.requests)
    protocol.script = lambda request, number: longer(request)
    dataset = score(rows, bpo.Judge(server, "pairwise"), output=output)
    assert dataset["scores"][:] == [[0.5, 1.0, 0.0]] * 6
    asked = [user_text(request) for request in protocol.requests[n_before:]]
    # The last request of the first run may still have been under way when it ended.
    assert len(set(asked)) == 6 * 5 and len(asked) - len(set(asked)) <= 1


def test_settings_of_a_judge_are_checked():
    server = bpo.ChatServer("http://localhost:1", "m")
    for arguments, message in (
        ({"mode": "ranking"}, "mode must be"),
        ({"baseline": 0}, "mode='pairwise' alone"),
        ({"max_tokens": 0}, "max_tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            Judge(server, **arguments)
    with pytest.raises(TypeError, match="ChatServer"):
        Judge("http://localhost:1")


def test_without_httpx2_the_message_says_what_to_install():
    code = "import sys; sys.modules['httpx2'] = None; import bpo; bpo.ChatServer('http://localhost', 'm')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    said = "ImportError: Servers need the package httpx2: pip install 'balanced-preference-optimization[judge]'"
    assert said in done.stderr


@pytest.mark.parametrize("status", [None, 403, 404, 307])
def test_a_request_that_always_fails_holds_up_no_other(protocol, tmp_path, status):
    """Over some prompts the server hangs up, or refuses: the others are finished, by the first call already."""
    prompts = [f"prompt {number}" for number in range(9)]

    def script(request, number):
        return (status, {}) if user_text(request) in prompts[:2] else "hello"

    protocol.script = script
    output = tmp_path / "responses.jsonl"
    server = bpo.ChatServer(protocol.url, "m", max_retries=0, concurrency=2)
    for run in range(2):
        with pytest.warns(UserWarning, match="4 failed, 7 duplicate|7 duplicate, 4 failed"):
            dataset = bpo.sample_responses(server, prompts, 2, output=output, progress=False)
        assert dataset["responses"][:] == [[], []] + [["hello"]] * 7
        assert [row["dropped"]["failed"] for row in dataset] == [2, 2] + [0] * 7
        assert len(protocol.requests) == (18, 22)[run]


def test_what_was_not_tried_yet_goes_before_what_failed(protocol, tmp_path):
    asked = []

    def script(request, number):
        asked.append(user_text(request))
        return (400, {}) if user_text(request) == "one" else f"reply {number}"

    protocol.script = script
    output, server = tmp_path / "responses.jsonl", bpo.ChatServer(protocol.url, "m", concurrency=1)
    for prompts in (PROMPTS[:2], PROMPTS):
        with pytest.warns(UserWarning, match="failed"):
            bpo.sample_responses(server, prompts, 1, output=output, progress=False)
    assert asked == ["one", "two", "three", "one"]


def test_a_server_that_is_not_there_stops_a_run_and_one_that_goes_away_does_too(protocol):
    requests = [{"messages": [{"role": "user", "content": str(number)}]} for number in range(100)]
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    gone = bpo.ChatServer(url, "m", max_retries=0, concurrency=4)
    with pytest.raises(ConnectionError, match=f"{url}/v1 cannot be reached"):
        list(gone.map(requests))
    assert gone.n_requests <= 12

    def script(request, number):
        if number == 3:
            protocol.socket.close()
        return "hello"

    protocol.script = script
    server = bpo.ChatServer(protocol.url, "m", max_retries=0, concurrency=1)
    replies = []
    with pytest.raises(ConnectionError, match="cannot be reached"):
        replies += server.map(requests)
    assert 19 <= len(replies) <= 21  # a connection that waited to be accepted is lost rather than refused


def test_retry_after_is_waited_for_or_the_request_fails_at_once(protocol):
    server = bpo.ChatServer(protocol.url, "m", max_retry_after=5)
    protocol.script = lambda request, number: "hello" if number else (429, {"retry-after": "1"})
    assert ask(server).text == "hello" and protocol.times[1] - protocol.times[0] >= 1
    protocol.script = lambda request, number: (429, {"retry-after": "6"})
    with pytest.raises(bpo.ChatError, match=r"status 429: provoked 429; .* in 6 s, and max_retry_after is 5 s"):
        ask(server)
    assert len(protocol.requests) == 3
    for nonsense in ("soon", "-1", "nan", "inf", "1e999", "", "Mon, 99 Foo 9999 25:61:61 GMT"):
        protocol.script = lambda request, number, given=nonsense: (
            "hello" if number % 2 == 0 else (429, {"retry-after": given})
        )
        assert ask(server).text == "hello"


def test_a_reply_has_a_largest_size(protocol):
    server = bpo.ChatServer(protocol.url, "m", max_retries=0)
    protocol.script = lambda request, number: "x" * 2**20
    assert len(ask(server).text) == 2**20
    protocol.script = lambda request, number: "x" * 2**24
    with pytest.raises(bpo.ChatError, match="more than 16 MiB"):
        ask(server)


def test_requests_that_cannot_be_sent_are_failures_of_their_own(protocol):
    texts = ["fine", "half an emoji \ud83d", "fine, too"]
    requests = [{"messages": [{"role": "user", "content": text}]} for text in texts]
    deep = []
    for _ in range(100_000):
        deep = [deep]
    requests += [
        {"messages": [], "tools": deep},
        {"messages": [], "temperature": float("nan")},
        {"messages": [{1j}]},
        {},
    ]
    replies = dict(bpo.ChatServer(protocol.url, "m").map(requests))
    assert [isinstance(replies[place], bpo.ChatError) for place in range(7)] == [
        False,
        True,
        False,
        True,
        True,
        True,
        True,
    ]
    assert "half a character" in str(replies[1]) and len(protocol.requests) == 2


def test_a_cache_that_cannot_be_written_costs_no_reply(protocol, tmp_path):
    server = bpo.ChatServer(protocol.url, "m", cache=tmp_path / "replies.jsonl")
    (tmp_path / "replies.jsonl").mkdir()
    with pytest.warns(UserWarning, match="cache cannot be written any more.*replies.jsonl"):
        assert ask(server).text == "hello"
    assert ask(server).text == "hello" and server.n_cached == 1


def test_lines_of_the_cache_that_are_no_replies_are_asked_for_again(protocol, tmp_path):
    cache = tmp_path / "replies.jsonl"
    ask(bpo.ChatServer(protocol.url, "m", cache=cache))
    [line] = cache.read_text().splitlines()
    for damaged in (
        line.replace('"hello"', '["hello"]'),
        line.replace('"hello"', '"\\ud83d"'),
        line.replace('"stop"', "null"),
        "[" * 100_000,
        "[]",
        '{"key": [], "reply": {}}',
    ):
        cache.write_text(damaged + "\n")
        server = bpo.ChatServer(protocol.url, "m", cache=cache)
        assert ask(server).text == "hello" and server.n_requests == 1


def test_it_works_within_a_running_event_loop(protocol):
    async def main():
        return ask(bpo.ChatServer(protocol.url, "m")).text

    assert asyncio.run(main()) == "hello"


@pytest.fixture(scope="module")
def served(smollm2, tmp_path_factory):
    """The address of `transformers serve` with the demo's model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", smollm2, "--device", "cpu"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=file,
            stderr=file,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
    try:
        deadline = time.monotonic() + 180
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


# `transformers serve` samples only where the model's generation settings or these say so, and adds to them the fields
# of the request.
SAMPLING = {"generation_config": json.dumps({"do_sample": True, "top_k": 0})}


def test_sampling_from_a_real_server(served, smollm2, tmp_path, capsys):
    # The server seeds PyTorch as a whole, so that replies at the same time would mix their random numbers.
    server = bpo.ChatServer(served, smollm2, concurrency=1, extra_body=SAMPLING)
    settings = {"max_new_tokens": 6, "keep": ["truncated", "refusal"], "progress": False}
    dataset = bpo.sample_responses(server, ["Name a colour.", "What is 2+2?"], 2, **settings)
    assert all(len(row["responses"]) + row["dropped"]["duplicate"] == 2 for row in dataset)
    assert sum(map(len, dataset["responses"])) > 2
    again = bpo.sample_responses(server, ["What is 2+2?"], 2, **settings)
    assert again[0] == dataset[1]
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "responses.jsonl"
    prompts.write_text('{"prompt": "What is 2+2?"}\n')
    arguments = ["sample", served, str(prompts), "--model", smollm2, "--output", str(output), "--n-responses", "2"]
    more = ["--max-new-tokens", "6", "--keep", "truncated", "--keep", "refusal", "--concurrency", "1"]
    assert main([*arguments, *more, "--extra-body", json.dumps(SAMPLING)]) == 0
    assert "responses to 1 prompts" in capsys.readouterr().out
    assert json.loads(output.read_text())["responses"] == dataset[1]["responses"]
    with pytest.raises(bpo.ChatError, match=r"status 400: .*no/such-model"):
        ask(bpo.ChatServer(served, "no/such-model", max_retries=0))


def test_a_real_judge(served, smollm2, tmp_path, capsys):
    """SmolLM2 is too small to keep to the form, or keeps to it by chance: whatever it says, nothing is guessed."""
    data, output = tmp_path / "rows.jsonl", tmp_path / "scores.jsonl"
    data.write_text(json.dumps({"prompt": "What is 2+2?", "responses": ["4", "I do not know."]}) + "\n")
    criteria = "Which is right? Say nothing but the last line."
    server = bpo.ChatServer(served, smollm2, concurrency=1, cache=tmp_path / "replies.jsonl")
    judge = bpo.Judge(server, "pairwise", criteria=criteria, max_tokens=8)
    try:
        scores = score(str(data), judge, output=output)["scores"][0]
    except ValueError as error:
        assert "Not one of the 2 responses could be scored; the first: the judge's" in str(error)
        scores = [None, None]
    assert sum(judge.counts[name] for name in ("replies", "failed")) == 2 and judge.counts["failed"] == 0
    assert scores in ([1.0, 0.0], [0.5, 0.5], [0.0, 1.0], [None, None])
    assert (scores == [None, None]) == (judge.counts["unreadable"] > 0)
    arguments = ["score", str(data), "--judge", served, "--model", smollm2, "--output", str(tmp_path / "again.jsonl")]
    settings = ["--mode", "pairwise", "--criteria", criteria, "--max-tokens", "8", "--concurrency", "1"]
    status = main([*arguments, *settings, "--cache", str(tmp_path / "replies.jsonl")])
    assert status == (scores == [None, None])
    row = json.loads((tmp_path / "again.jsonl").read_text())
    assert row["scores"] == scores and row["score_errors"] == json.loads(output.read_text())["score_errors"]
