"""Files that are whole or not there, locks, and paths that must lie apart."""

import errno
import multiprocessing
import threading
from pathlib import Path

import pytest

from bpo.system.files import read_json, write_whole
from bpo.system.locks import locked
from bpo.system.paths import check_apart


def test_a_text_that_cannot_be_written_keeps_the_old_one_and_names_the_file(mount):
    disk = mount("-t", "tmpfs", "-o", "size=64k", "tmpfs")
    write_whole(disk / "x.json", "old")
    with pytest.raises(OSError) as caught:
        write_whole(disk / "x.json", "n" * 100_000)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(disk / "x.json"))
    assert [path.read_text() for path in disk.iterdir()] == ["old"]


def test_what_has_no_utf8_is_written_as_json_spells_it(tmp_path):
    write_whole(tmp_path / "x.json", '"half of 😀: \ud83d"')
    assert read_json((tmp_path / "x.json").read_bytes(), "x") == "half of 😀: \ud83d"


def test_json_that_cannot_be_read_is_named():
    for text in ("[" * 100_000, "{", b"\xff", "9" * 5000 + "x"):
        with pytest.raises(ValueError, match=r"^settings is n"):
            read_json(text, "settings")


def hold(directory, taken, done):
    with locked(Path(directory), ".lock", "busy"):
        taken.set()
        done.wait(60)


def test_a_directory_is_one_process_at_a_time(tmp_path):
    """It is made for the lock, and goes again where nothing came into it; the lock goes with whoever has it."""
    directory = tmp_path / "a" / "b"
    context = multiprocessing.get_context("fork")
    for end in ("done", "killed"):
        taken, done = context.Event(), context.Event()
        process = context.Process(target=hold, args=(str(directory), taken, done))
        process.start()
        assert taken.wait(60)
        with (
            pytest.raises(BlockingIOError, match=f"b: process {process.pid} on .* busy"),
            locked(directory, ".lock", "busy"),
        ):
            pass
        if end == "done":
            done.set()
            process.join()
            assert not directory.exists()
        else:
            process.kill()
            process.join()
            assert [path.name for path in directory.iterdir()] == [".lock"]
    with locked(directory, ".lock", "busy"):
        (directory / "file").touch()
    assert [path.name for path in directory.iterdir()] == ["file"]


def test_threads_wait_for_each_other(tmp_path):
    """Also while the directory and the file come and go; who made the directory need not be the last to leave it."""
    inside, most, errors = [0], [0], []

    def work():
        try:
            for _ in range(100):
                with locked(tmp_path / "d", ".lock", "busy", wait=60):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    inside[0] -= 1
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (errors, most) == ([], [1])


@pytest.mark.parametrize(
    ("written", "read", "stores", "message"),
    [
        ({"--output": "out", "--store": "out/x"}, {}, {}, "--store .*out/x lies within --output .*out"),
        ({"--output": "st/x", "--store": "st"}, {}, {}, "--output .*st/x lies within --store"),
        ({"--output": "out", "--store": "link"}, {}, {}, "are the same"),
        ({"--output": "out"}, {"dataset": "out/data.jsonl"}, {}, "dataset .*data.jsonl lies within --output"),
        ({"--output": "out/data.jsonl"}, {"dataset": "./out/../out/data.jsonl"}, {}, "are the same"),
        ({"--output": "st/x/y"}, {}, {"store": "st"}, "--output .*st/x/y lies within store"),
        ({"--output": "out/x", "--cache": None}, {"dataset": "out", "model": "org/name"}, {}, None),
        ({"--output": "new"}, {"dataset": "new", "model": [1]}, {"store": None}, None),
    ],
)
def test_paths_lie_apart(tmp_path, monkeypatch, written, read, stores, message):
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    Path("out/data.jsonl").touch()
    Path("link").symlink_to("out")
    if message is None:
        check_apart(written, read, stores)
    else:
        with pytest.raises(ValueError, match=message):
            check_apart(written, read, stores)


def test_a_file_that_is_left_of_a_lock_stops_nobody(tmp_path):
    (tmp_path / ".lock").write_text("left")
    with locked(tmp_path, ".lock", "busy"):
        pass
    assert list(tmp_path.iterdir()) == []
