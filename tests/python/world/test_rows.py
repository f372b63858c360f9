"""Several real processes that sample and score responses together, die, hang and disagree.

A few times on every run; ``make torture`` sets BPO_TORTURE for many kills.
"""

import contextlib
import itertools
import json
import os
import sys
import threading
import time

import numpy as np
import pytest

import bpo
import bpo.responses.rowblocks
import bpo.world.world
import job
from chat_server import ProtocolServer
from store_writer import contents
from tiny import build_tokenizer, tiny_llama

TORTURE = int(os.environ.get("BPO_TORTURE", "0"))
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no forkserver")

PROMPTS = [{"prompt": f"{index} red cat" + " dog" * (index % 5), "id": index} for index in range(16)]
# Some have all scores already.
SCORED = [
    {"prompt": f"{index}", "responses": ["a" * (index + 1), "bb", "c\u00e9"], "id": index}
    | ({"scores": [1.0, 2.0, 3.0]} if index % 4 == 3 else {"scores": [None, 5.0, None]})
    for index in range(16)
]


def sample(rank, output=None, prompts=PROMPTS, **settings):
    """Responses of a tiny model, in batches of two prompts."""
    tokenizer = build_tokenizer()
    model = settings.pop("model", None) or tiny_llama(tokenizer)
    given = {"keep": ["truncated"], "batch_size": 4, "max_new_tokens": 8, "progress": False, **settings}
    return bpo.sample_responses(model, prompts, 2, processing_class=tokenizer, output=output, **given)


class Length:
    """A scorer that writes down what it scores, and fails at one response."""

    def __init__(self, factor=1.0, trace=None, wait=0.0):
        self.factor = factor
        self.trace = trace
        self.wait = wait

    def describe(self):
        return {"factor": self.factor}

    def __call__(self, prompt, response):
        time.sleep(self.wait)
        if self.trace is not None:
            with self.trace.open("a") as file:
                file.write(f"{prompt} {response}\n")
        if response == "aaaaa":
            raise ValueError("five")
        return self.factor * len(response) / 7


def score(rank, output=None, rows=SCORED, scorer=None, **settings):
    return bpo.score_responses(rows, scorer or Length(), output=output, progress=False, **settings)


WORK = {"sample": sample, "score": score}


def taking(note, stops=(), size=2):
    """Notes each block that this process takes; nobody makes a row before so many are at some block."""
    make = bpo.responses.rowblocks._make
    met = set()

    def change(file, indices, work):
        while len(met) < size:
            met.update(path.read_text() for path in file.path.parent.glob("*.by"))
            time.sleep(0.01)
        with note.open("a") as taken:
            taken.write("x")
        while note.name in stops:
            time.sleep(1)
        make(file, indices, work)

    bpo.responses.rowblocks._make = change


def meeting(rank, what, output, stops=(), **settings):
    taking(output.with_suffix(f".took-{rank}"), stops, int(os.environ["WORLD_SIZE"]))
    rows = WORK[what](rank, output, **settings)
    output.with_suffix(f".rows-{rank}").write_text(json.dumps(rows.to_list()))


def files(output):
    """The bytes of the file and its manifest, which are all that there is."""
    found = contents(output.parent)
    return {name: found[name] for name in found if ".took-" not in name and ".rows-" not in name}


@pytest.fixture(scope="module", params=list(WORK))
def whole(request, tmp_path_factory):
    """What one process makes."""
    path = tmp_path_factory.mktemp("one") / "rows.jsonl"
    rows = WORK[request.param](0, path)
    assert set(files(path)) == {"rows.jsonl", "rows.manifest.json"}
    return request.param, files(path), rows.to_list()


def test_the_file_does_not_depend_on_the_number_of_processes(tmp_path, whole):
    what, made, rows = whole
    size = {"sample": 3, "score": 2}[what]
    output = tmp_path / "made" / "rows.jsonl"
    output.parent.mkdir()
    job.finish(job.start(size, tmp_path, meeting, what, output), tmp_path)
    assert files(output) == made
    taken = [len(output.with_suffix(f".took-{rank}").read_text()) for rank in range(size)]
    assert sum(taken) == {"sample": 8, "score": 12}[what] and min(taken) >= 1, taken
    for rank in range(size):
        assert json.loads(output.with_suffix(f".rows-{rank}").read_text()) == rows


def without_file(rank, output):
    found = {what: work(rank).to_list() for what, work in WORK.items()}
    (output / f"{rank}.json").write_text(json.dumps(found))


def test_without_a_file_each_process_gets_all_rows(tmp_path):
    job.finish(job.start(2, tmp_path, without_file, tmp_path), tmp_path)
    expected = {what: work(0).to_list() for what, work in WORK.items()}
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected


def failing(rank, output):
    class Broken(bpo.Scorer):
        share = 1

        def describe(self):
            return {}

        def scores(self, rows):
            if rank == 1:
                raise OSError("the disk is gone")
            time.sleep(0.1)
            yield 0, [0.0] * len(rows[0].responses)

    score(rank, scorer=Broken())


def test_what_one_cannot_do_without_a_file_all_hear_of(tmp_path):
    job.refused(job.start(2, tmp_path, failing, tmp_path), tmp_path, "OSError: the disk is gone")


def rows_in(output):
    paths = [output, *output.parent.glob("rows.parts/[0-9]*.jsonl")]
    found = 0
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            found += path.read_bytes().count(b"\n")
    return found


def test_killed_processes_lose_nothing_and_any_number_goes_on_to_the_same_bytes(tmp_path, whole):
    what, made, _ = whole
    generator = np.random.default_rng(0)
    kills = 0
    for number in itertools.count():
        output, finished = tmp_path / f"{number}" / "rows.jsonl", False
        output.parent.mkdir()
        while not finished:
            size, before = int(generator.integers(1, 4)), rows_in(output)
            settings = {"scorer": Length(wait=0.01)} if what == "score" else {}
            members = job.start(size, tmp_path / "out", keywords, what, output, settings)
            wanted = before + int(generator.integers(1, 14))
            while any(member.is_alive() for member in members) and rows_in(output) < wanted:
                time.sleep(0.005)
            victims = generator.permutation(size)[: generator.integers(1, size + 1)]
            kills += sum(members[victim].is_alive() for victim in victims)
            job.kill([members[victim] for victim in victims])
            for member in members:
                member.join(600)
            finished = any(member.exitcode == 0 for member in members)
            assert rows_in(output) >= before
        WORK[what](0, output)  # tidies up after those that were killed when they did
        assert {name: value for name, value in files(output).items() if not name.startswith(".")} == made
        if kills >= (TORTURE or 2):
            break
    print(f"{kills} kills of {number + 1} files")


def keywords(rank, what, output, settings):
    WORK[what](rank, output, **settings)


def test_one_that_dies_is_replaced_and_one_by_itself_stays_out_meanwhile(tmp_path, whole):
    what, made, rows = whole
    if what == "sample" and not TORTURE:
        pytest.skip("scores suffice")
    output = tmp_path / "made" / "rows.jsonl"
    output.parent.mkdir()
    members = job.start(3, tmp_path, meeting, what, output, ["rows.took-0"])
    while not output.with_suffix(".took-0").exists():
        assert members[0].is_alive(), job.said(tmp_path, 0)
        time.sleep(0.01)
    with pytest.raises(BlockingIOError, match=r"rows\.parts.*is writing to this file"):
        WORK[what](0, output)
    members[0].kill()
    for member in members:
        member.join(600)
    assert [member.exitcode for member in members[1:]] == [0, 0], job.said(tmp_path, 1)
    assert files(output) == made
    assert json.loads(output.with_suffix(".rows-2").read_text()) == rows


def hanging(rank, output):
    settings = {"config": {"process_timeout": 2.0}}
    meeting(rank, "sample", output, ["rows.took-1"], **settings)


def test_one_that_hangs_is_named_and_what_was_made_is_gone_on_from_with_the_same_settings_only(tmp_path):
    output = tmp_path / "made" / "rows.jsonl"
    output.parent.mkdir()
    members = job.start(2, tmp_path, hanging, output)
    members[0].join(600)
    said = job.said(tmp_path, 0)
    assert f"TimeoutError: Nothing came to the file {output} for 2 s (process_timeout): process 1 (" in said
    assert f"process 1 ({members[1].pid} on " in said
    job.kill(members)
    there = rows_in(output)
    assert there == 14 and not output.exists()
    with pytest.raises(ValueError, match=r"was written with other settings: seed \(42 there, 1 now\)"):
        sample(0, output, seed=1)
    with pytest.raises(ValueError, match="were made from other prompts"):
        sample(0, output, prompts=PROMPTS[1:])
    sample(0, output)
    assert rows_in(output) == 16 and not output.with_suffix(".parts").exists()


def unlike(rank, output):
    changed = {
        "data set": lambda: sample(rank, output, prompts=PROMPTS[rank:]),
        "temperature": lambda: sample(rank, output, temperature=1.0 + rank),
        "batch_size": lambda: sample(rank, output, batch_size=4 + rank),
        "output": lambda: sample(rank, output if rank else None),
        "scorer.factor": lambda: score(rank, output, scorer=Length(1.0 + rank)),
        "overwrite": lambda: score(rank, output, overwrite=bool(rank)),
    }
    for name, call in changed.items():
        with pytest.raises(ValueError, match=f"another {name} than"):
            call()


def test_processes_that_were_given_other_things_are_refused_by_name(tmp_path):
    output = tmp_path / "rows.jsonl"
    job.finish(job.start(2, tmp_path / "out", unlike, output), tmp_path / "out")
    assert not list(tmp_path.glob("rows*"))


def elsewhere(rank, output):
    sample(rank, output if rank == 0 else output.parent / "elsewhere" / output.name)


def test_a_file_that_not_all_see_is_refused(tmp_path):
    job.refused(
        job.start(2, tmp_path / "out", elsewhere, tmp_path / "rows.jsonl"),
        tmp_path / "out",
        "name a file on a disk that all processes see",
    )
    assert not (tmp_path / "elsewhere").exists()


def asking(rank, url, output):
    server = bpo.ChatServer(url, "m", concurrency=2)
    sampled = sample(rank, model=server, prompts=["red cat", "two dogs", "the sun"], keep=["refusal"])
    scored = score(rank, rows=sampled, scorer=bpo.Judge(server))
    (output / f"{rank}.json").write_text(json.dumps([scored.to_list(), server.n_requests]))


def test_one_process_asks_a_server_and_all_get_what_it_said(tmp_path):
    said = itertools.count()
    with ProtocolServer() as server:
        server.script = lambda request, number: "Rating: 7" if "Rating" in str(request) else f"dog {next(said)}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        job.finish(job.start(2, tmp_path, asking, server.url, tmp_path), tmp_path)
        server.shutdown()
    (first, asked), (second, by_the_other) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second and len(first) == 3
    assert asked == len(server.requests) == 12 and by_the_other == 0
