"""The file of rows that sampling and scoring append to: one writer, whole rows, and nothing stale."""

import json
import os
import subprocess
import sys
import threading

import pytest

import bpo
from bpo.responses.rowfile import ROW_ID, RowFile
from bpo.system.locks import FileLock
from tiny import tiny_llama

ROWS = [{"prompt": f"p{index}", "responses": [f"a{index}", f"bb{index}"]} for index in range(4)]


def length(prompt, response):
    return len(response)


def score(rows, scorer, **settings):
    return bpo.score_responses(rows, scorer, progress=False, **settings)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


HOLD = """
import os, sys, time
from pathlib import Path
from bpo.system.locks import FileLock

lock = FileLock.beside(Path(sys.argv[1]))
running, runs = os.pipe()
child = os.fork() if "child" in sys.argv else 1
if "child" in sys.argv:
    os.read(running, 1) if child else os.write(runs, b".")  # until it runs, it has its part in the lock
if child:
    print(child, flush=True)
sys.stdin.read()
lock.release()
"""


def holder(path, *arguments):
    """A process that holds the lock of a file until its input is closed, and the id of its child."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    return process, int(process.stdout.readline())


def test_a_second_writer_is_refused_by_name(tmp_path):
    path = tmp_path / "scores.jsonl"
    process, _ = holder(path)
    called = []
    with pytest.raises(BlockingIOError, match=rf"scores\.jsonl: process {process.pid} on .* is writing to this file"):
        score(ROWS, lambda prompt, response: called.append(response), output=path)
    assert not called and not path.exists()
    process.communicate()
    assert process.returncode == 0
    assert score(ROWS, length, output=path)["scores"][:] == [[2, 3]] * 4
    assert sorted(file.name for file in tmp_path.iterdir()) == ["scores.jsonl", "scores.manifest.json"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forked children")
def test_a_killed_holder_stops_nobody_and_neither_does_its_child(tmp_path):
    path = tmp_path / "scores.jsonl"
    process, child = holder(path, "child")
    with pytest.raises(BlockingIOError):
        FileLock.beside(path)
    process.kill()
    process.wait()
    os.kill(child, 0)  # it is there, waiting
    FileLock.beside(path).release()
    process.stdin.close()


def test_threads_exclude_each_other_and_a_call_that_fails_lets_go(tmp_path):
    path = tmp_path / "scores.jsonl"
    inside, go_on = threading.Event(), threading.Event()

    def slow(prompt, response):
        inside.set()
        assert go_on.wait(60)
        return len(response)

    thread = threading.Thread(target=score, args=(ROWS, slow), kwargs={"output": path})
    thread.start()
    assert inside.wait(60)
    with pytest.raises(BlockingIOError, match=f"process {os.getpid()} on"):
        score(ROWS, slow, output=path)
    go_on.set()
    thread.join()
    kept = path.read_bytes()

    def interrupted(prompt, response):
        raise KeyboardInterrupt

    try:
        score(ROWS, interrupted, output=tmp_path / "other.jsonl")
    except KeyboardInterrupt as error:
        held = error  # with its traceback, as notebooks keep it
        FileLock.beside(tmp_path / "other.jsonl").release()
    assert held and path.read_bytes() == kept


def test_others_rows_are_read_when_the_file_becomes_ours(tmp_path):
    path, ids = tmp_path / "rows.jsonl", ["0", "1", "2"]
    early = RowFile(path, "x", {}, ids)
    with RowFile(path, "x", {}, ids) as other:
        other.add("1", {"text": "theirs"})
    with early:
        assert early.rows["1"]["text"] == "theirs"
        early.add("0", {"text": "ours"})
        early.add("2", {"text": "ours"})
        assert [row["text"] for row in early.finish()] == ["ours", "theirs", "ours"]


@pytest.mark.parametrize("room", [0, 5000, 9000])
def test_a_full_disk_cuts_no_row(mount, room):
    """Rows of 3 KB, of which the first, the second or the third is written in part only."""
    directory = mount("-t", "tmpfs", "-o", "size=400k", "tmpfs")
    path, ids = directory / "rows.jsonl", [str(index) for index in range(9)]
    failed = []
    with RowFile(path, "x", {}, ids) as rows, (directory / "fill").open("wb", buffering=0) as fill:
        disk = os.statvfs(directory)
        fill.write(b"x" * (disk.f_bavail * disk.f_bsize - room))
        for index in range(9):
            if index == 5:
                fill.truncate(0)
            try:
                rows.add(str(index), {"text": f"{index}" * 3000})
            except OSError as error:
                failed.append(index)
                assert error.filename == str(path) and "rows finished so far are kept" in str(error)
            # Whatever happened, another process could go on from here.
            assert len(RowFile(path, "x", {}, ids).rows) == index + 1 - len(failed)
    assert failed and failed == list(range(failed[0], 5))
    with RowFile(path, "x", {}, ids) as rows:
        for index in failed:
            rows.add(str(index), {"text": f"{index}" * 3000})
        assert [row["text"][0] for row in rows.finish()] == ids


def test_a_file_that_is_removed_or_cut_while_it_is_written_ends_whole(tmp_path):
    path, ids = tmp_path / "rows.jsonl", ["0", "1", "2", "3"]
    with RowFile(path, "x", {}, ids) as rows:
        rows.add("0", {"text": "zero"})
        path.unlink()
        rows.add("1", {"text": "one"})
        assert [row["text"] for row in lines(path)] == ["zero", "one"]
        os.truncate(path, 7)
        rows.add("2", {"text": "two"})
        assert [row["text"] for row in lines(path)] == ["zero", "one", "two"]


@pytest.mark.parametrize(
    "line",
    [
        b'{"prompt": "x"}',
        b"[" * 100_000,
        b'{"bpo_id": ["0"]}',
        b"\x00\x00",
        b'{"bpo_id": "0", "scores": [1.0], "score_errors": []}',
        b'{"bpo_id": "0", "scores": ["high"], "score_errors": [null]}',
        b'{"bpo_id": "0"}',
    ],
)
def test_a_line_that_is_no_row_of_ours_is_named(tmp_path, line):
    path = tmp_path / "scores.jsonl"
    score(ROWS, length, output=path)
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(ValueError, match=r"scores\.jsonl, line 5: no row that bpo wrote\. Remove the line"):
        score(ROWS, length, output=path)


def test_a_torn_last_line_is_made_again_without_a_word(tmp_path):
    path = tmp_path / "scores.jsonl"
    score(ROWS, length, output=path)
    whole = path.read_bytes()
    for cut in (1, 30, len(whole) - 1, len(whole)):
        path.write_bytes(whole[:-cut])
        assert score(ROWS, length, output=path)["scores"][:] == [[2, 3]] * 4
        assert path.read_bytes() == whole


def test_columns_are_those_of_the_data_now(tmp_path):
    path = tmp_path / "scores.jsonl"
    calls = []

    def counted(prompt, response):
        calls.append(response)
        return len(response)

    weighed = [{**row, "weight": 1.0, "old": True} for row in ROWS]
    assert score(weighed[:2], counted, output=path)["weight"][:] == [1.0, 1.0]
    weighed = [{**row, "weight": 5.0 + index, "new": "x"} for index, row in enumerate(ROWS)]
    dataset = score(weighed, counted, output=path)
    assert dataset["weight"][:] == [5, 6, 7, 8] and "old" not in dataset.column_names and len(calls) == 8
    assert [{name: row[name] for name in ("weight", "new")} for row in lines(path)] == [
        {"weight": 5.0 + index, "new": "x"} for index in range(4)
    ]
    assert all(ROW_ID in row and "old" not in row for row in lines(path))


def test_columns_that_a_scorer_reads_make_scores_stale(tmp_path):
    class Agrees(bpo.Scorer):
        def describe(self):
            return {"scorer": "agrees"}

        def scores(self, rows):
            for index, row in enumerate(rows):
                yield index, [float(text == row.columns["answer"]) for text in row.responses]

    path = tmp_path / "scores.jsonl"
    rows = [{**row, "answer": "a0"} for row in ROWS]
    assert score(rows, Agrees(), output=path)["scores"][0] == [1.0, 0.0]
    with pytest.raises(ValueError, match="other prompts or responses"):
        score([{**row, "answer": "bb0"} for row in ROWS], Agrees(), output=path)
    Agrees.reads_columns = False
    other = tmp_path / "other.jsonl"
    score(rows, Agrees(), output=other)
    assert score([{**row, "answer": "bb0"} for row in ROWS], Agrees(), output=other)["scores"][0] == [1.0, 0.0]


def test_other_scores_in_the_data_are_refused(tmp_path):
    path = tmp_path / "scores.jsonl"
    rows = [{**row, "scores": [1.0, None]} for row in ROWS]
    assert score(rows, length, output=path)["scores"][0] == [1.0, 3.0]
    with pytest.raises(ValueError, match=r"holds 4 rows .*other scores.*the first is line 1"):
        score([{**row, "scores": [2.0, None]} for row in ROWS], length, output=path)


class Weighted:
    def __init__(self, weight):
        self.weight = weight
        self.calls = 0
        self.seen = {}

    def __call__(self, prompt, response):
        self.calls += 1
        self.seen[response] = prompt
        return self.weight * len(response)


def test_scores_of_an_object_with_other_values_are_refused(tmp_path):
    path = tmp_path / "scores.jsonl"
    scorer = Weighted(2)
    score(ROWS[:2], scorer, output=path)
    # What it counts and remembers, the same work changes.
    assert score(ROWS, scorer, output=path)["scores"][:] == [[4, 6]] * 4
    assert scorer.calls == 8
    assert score(ROWS, Weighted(2), output=path)["scores"][:] == [[4, 6]] * 4
    with pytest.raises(ValueError, match=r"other settings: scorer\.weight \(2 there, -1 now\)"):
        score(ROWS, Weighted(-1), output=path)
    with pytest.raises(ValueError, match=r"other settings: scorer\.lists"):
        score(ROWS, Weighted(2), output=path, batch_size=4)


def test_what_cannot_be_compared_is_said(tmp_path):
    path, lock = tmp_path / "scores.jsonl", threading.Lock()

    def guarded(prompt, response):
        with lock:
            return len(response)

    score(ROWS[:2], guarded, output=path)
    with pytest.warns(UserWarning, match=r"nobody can say whether scorer\.closure\.lock is what it was"):
        score(ROWS, guarded, output=path)


def test_responses_that_would_end_elsewhere_are_refused_and_columns_follow(tokenizer, tmp_path):
    model, path = tiny_llama(tokenizer), tmp_path / "responses.jsonl"
    settings = {"processing_class": tokenizer, "max_new_tokens": 4, "keep": ["truncated"], "progress": False}
    prompts = [{"prompt": "one cat", "weight": 1.0}, {"prompt": "two cats", "weight": 1.0}]
    first = bpo.sample_responses(model, prompts, 3, output=path, **settings)
    again = bpo.sample_responses(model, [{**row, "weight": 5.0} for row in prompts], 3, output=path, **settings)
    assert again["weight"][:] == [5.0, 5.0] and again["responses"][:] == first["responses"][:]
    assert [row["weight"] for row in lines(path)] == [5.0, 5.0]
    model.generation_config.eos_token_id = 5
    with pytest.raises(ValueError, match=r"other settings: model\.end_tokens \(\[2\] there, \[2, 5\] now\)"):
        bpo.sample_responses(model, prompts, 3, output=path, **settings)


def test_settings_that_are_no_json_are_refused_before_any_work(tmp_path):
    scorer = Weighted(1)
    scorer.describe = lambda: {"server": object()}
    with pytest.raises(ValueError, match="must be JSON"):
        score(ROWS, scorer, output=tmp_path / "scores.jsonl")
    assert scorer.calls == 0
    scorer.describe = lambda: {"threshold": float("nan")}
    for _ in range(2):
        score(ROWS, scorer, output=tmp_path / "scores.jsonl")
    assert scorer.calls == 8


def test_a_file_is_the_file_that_was_named(tmp_path):
    directory = tmp_path / "runs [1] *"
    path = directory / "scores::ü [a]?.jsonl"
    expected = score(ROWS, length, output=path).to_list()
    assert score(ROWS, length, output=path).to_list() == expected
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    more = [*ROWS, {"prompt": "new", "responses": ["c"]}]
    assert len(score(more, length, output=link)) == 5
    assert link.is_symlink() and len(lines(path)) == 5
    with pytest.raises(ValueError, match=r"~nobody-of-this-name/x\.jsonl"):
        score(ROWS, length, output="~nobody-of-this-name/x.jsonl")
