"""Responses that are sampled, and their scores by a function, a reward model, and a judge behind a server."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

import bpo
from record import observation
from world import TINY

PROMPTS = [f"{index} red {'cat dog ' * (index % 4)}?" for index in range(5)]
SAMPLING = {"max_new_tokens": 10, "keep": ["truncated"], "progress": False}


def length(prompt, response):
    return len(response) + len(prompt) / 100


def picky(prompt, response):
    if "cat" in response:
        raise KeyError("cat")
    return None if "dog" in response else float(len(response))


class Server(ThreadingHTTPServer):
    """Speaks the protocol of chat completions: rates and compares by length, and else repeats what it is told."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        asked = request["messages"][-1]["content"]
        if "Winner:" in asked:
            first, second = map(len, re.findall(r"<response_[AB]\w*>\n(.*?)\n</response", asked, re.DOTALL))
            answer = f"Both are short.\nWinner: {'tie' if first == second else 'A' if first % 5 else 'B'}"
        elif "Rating:" in asked:
            answer = f"Fine.\nRating: {1 + len(asked) % 12}"
        else:
            answer = f"{asked} {request.get('seed', 0) % 7}"
        choice = {"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}
        data = json.dumps({"id": "x", "object": "chat.completion", "model": "m", "choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@observation
def sampled(record, world):
    def sample(prompts, **settings):
        given = {"processing_class": world.tokenizer, **SAMPLING, **settings}
        return bpo.sample_responses(world.model, prompts, 3, **given)

    record.values("text", sample(PROMPTS, output="sampled.jsonl"))
    record.files("sampled.jsonl", "sampled.jsonl")
    record.files("manifest.json", "sampled.manifest.json")
    record.values("again", sample(PROMPTS, output="sampled.jsonl"))
    record.error("other settings", lambda: sample(PROMPTS, output="sampled.jsonl", temperature=0.5))
    record.values("other seed", sample(PROMPTS, seed=1, temperature=0.7, top_p=0.8, batch_size=4))
    record.values("messages", sample([row["prompt"] for row in world.messages[:3]]))
    record.values("beside others", sample(world.rows[:3], keep_existing=True))
    record.values("dropping", sample(PROMPTS, keep=[], max_new_tokens=40, temperature=3.0))


@observation
def scored(record, world):
    rows = [{name: row[name] for name in ("prompt", "responses")} for row in world.rows[:5]]
    record.values("function", bpo.score_responses(rows, length, output="scored.jsonl", progress=False))
    record.files("scored.jsonl", "scored.jsonl")
    record.files("manifest.json", "scored.manifest.json")
    failing = bpo.score_responses(rows, picky, progress=False)
    record.values("failures", failing)
    record.values("described", [bpo.describe_responses(failing), str(bpo.describe_responses(failing))])
    record.text("described.txt", str(bpo.describe_responses("sampled.jsonl")))
    record.values("overwritten", bpo.score_responses(world.rows[:2], length, overwrite=True, progress=False))
    record.values("pairs", bpo.score_responses(world.pairs[:3], length, progress=False))
    torch.manual_seed(0)
    size = {"vocab_size": len(world.tokenizer), **TINY, "num_labels": 1, "pad_token_id": world.tokenizer.pad_token_id}
    LlamaForSequenceClassification(LlamaConfig(**size)).save_pretrained("reward")
    world.tokenizer.save_pretrained("reward")
    reward = bpo.RewardModel("reward", config={"device": "cpu"})
    record.values("reward", [reward.describe(), bpo.score_responses(rows, reward, progress=False)])
    record.values("reward, messages", bpo.score_responses(world.messages[:2], reward, overwrite=True, progress=False))


@observation
def judged(record, world):
    rows = [{"prompt": row["prompt"], "responses": row["responses"][:3]} for row in world.rows[:4]]
    with Server() as server:
        record.replaced[server.url] = "SERVER"
        chat = bpo.ChatServer(server.url, "judge", "key", concurrency=1, cache="replies.jsonl")
        record.values(
            "server", [repr(chat), chat.describe(), chat.complete([{"role": "user", "content": "hi"}], seed=3)]
        )
        record.values("sampled", bpo.sample_responses(chat, PROMPTS, 3, progress=False))
        for mode, settings in {"rating": {}, "pairwise": {}, "baseline": {"mode": "pairwise", "baseline": 1}}.items():
            judge = bpo.Judge(chat, **{"mode": mode, **settings})
            record.values(mode, [bpo.score_responses(rows, judge, progress=False), judge.counts, judge.describe()])
        record.values("requests", [chat.n_requests, chat.n_cached])
        # The key of a reply is a hash of its request, and so of the server's port.
        record.text("replies.jsonl", Path("replies.jsonl").read_text(), hidden=[(r'"key": "\w+"', '"key": "KEY"')])
