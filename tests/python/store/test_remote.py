"""Stores at an address: sent while they are filled, fetched as far as they are lacking, and what goes wrong there.

In the memory of this process, on a disk, and on a server that speaks S3.
"""

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import bpo
from bpo import GradientStore, StoreDamagedError, StoreError, StoreLockedError
from bpo.cli.main import main
from bpo.gradients.checkpoints import _directories
from bpo.store import mirror, objects, snapshot, upload
from bpo.store.objects import Objects
from bpo.training.rounds import store_of
from remote_writer import SEGMENT_BYTES, fill
from store_writer import batch, contents, flip, write
from tiny import scored_rows

TORTURE = int(os.environ.get("BPO_TORTURE", "0"))
WRITER = Path(__file__).parents[1] / "helpers" / "remote_writer.py"


@pytest.fixture(scope="module")
def server():
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket(server, monkeypatch):
    """The address of a bucket on a server that speaks S3."""
    from fsspec.config import conf

    keys = {"AWS_ACCESS_KEY_ID": "user", "AWS_SECRET_ACCESS_KEY": "word", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**keys, "AWS_EC2_METADATA_DISABLED": "true", "FSSPEC_S3_ENDPOINT_URL": server}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(conf, "s3", {"endpoint_url": server})  # which fsspec reads when it is imported
    import fsspec

    fsspec.get_filesystem_class("s3").clear_instance_cache()
    files = fsspec.filesystem("s3")
    if not files.exists("bucket"):
        files.mkdir("bucket")
    yield "s3://bucket"
    files.rm("bucket", recursive=True)


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    return f"memory://{tmp_path}/gradients" if request.param == "memory" else f"file://{tmp_path}/remote/gradients"


@pytest.fixture
def at(monkeypatch, tmp_path):
    """Has this process be on a machine, which has a cache of its own."""

    def go(machine):
        monkeypatch.setenv("BPO_CACHE", str(tmp_path / machine))

    for module in (snapshot, upload):
        monkeypatch.setattr(module, "SEGMENT_BYTES", SEGMENT_BYTES)
    monkeypatch.setattr(upload, "_STEP_BYTES", 8 * SEGMENT_BYTES)
    go("one")
    return go


@pytest.fixture
def reads(monkeypatch):
    """The names of the objects that are read."""
    names = []
    read = Objects.read
    monkeypatch.setattr(Objects, "read", lambda self, name, most: names.append(name) or read(self, name, most))
    return names


def whole(tmp_path, total, dtype="float16"):
    write(tmp_path / f"whole-{total}", total, dtype)
    return contents(tmp_path / f"whole-{total}")


def segments(names):
    return sorted(name for name in names if name.startswith("segments/"))


@pytest.mark.parametrize("where", ["memory", "file", "s3"])
def test_a_store_is_the_same_elsewhere_and_only_what_is_lacking_is_fetched(where, at, tmp_path, reads, request):
    url = f"{where}://{tmp_path}/remote" if where != "s3" else request.getfixturevalue("bucket") + "/gradients"
    fill(url, 120)
    at("two")
    assert contents(GradientStore(url).path) == whole(tmp_path, 120)
    fetched = len(segments(reads))
    assert fetched == len(Objects(url).names("segments")) > 10
    reads.clear()
    assert len(GradientStore.open(url)) == 120
    assert segments(reads) == []
    at("one")
    fill(url, 150)
    at("two")
    reads.clear()
    store = GradientStore(url)
    assert contents(store.path) == whole(tmp_path, 150)
    assert 0 < len(segments(reads)) < fetched
    # Nothing is left there that nothing needs.
    assert segments(f"segments/{name}" for name in Objects(url).names("segments")) == sorted(
        snapshot.latest(Objects(url)).segments()
    )
    assert len(Objects(url).names("manifests")) == 1


def test_a_store_that_is_whole_is_served_and_nothing_is_written(url, at, monkeypatch):
    fill(url, 30)
    before = snapshot.latest(Objects(url))
    for name in ("write", "create", "put"):
        monkeypatch.delattr(Objects, name)
    at("two")
    with upload.writing(url) as (directory, _):
        assert len(GradientStore(directory)) == 30
    assert snapshot.latest(Objects(url)) == before


def test_a_copy_that_was_damaged_is_mended_from_the_address(at, tmp_path, reads):
    url = f"file://{tmp_path}/remote"
    fill(url, 60)
    at("two")
    path = GradientStore(url).path
    reads.clear()
    flip(path / "rows.f16", 1000)
    flip(path / "records.bin", 72 * 41 + 5)
    (path / "manifest.copy.json").write_text("{}")
    assert contents(GradientStore(url).path) == whole(tmp_path, 60)
    assert len(segments(reads)) == 2
    os.truncate(path / "records.bin", 100)
    assert contents(GradientStore(url).path) == whole(tmp_path, 60)


def test_a_fetch_that_is_interrupted_goes_on(at, tmp_path, reads, monkeypatch):
    url = f"file://{tmp_path}/remote"
    fill(url, 100)
    at("two")
    read, left = Objects.read, [12]

    def failing(self, name, most):
        if name.startswith("segments/"):
            left[0] -= 1
            if left[0] < 0:
                raise ConnectionError("gone")
        return read(self, name, most)

    with monkeypatch.context() as patched:
        patched.setattr(Objects, "read", failing)
        with pytest.raises(ConnectionError, match="gone"):
            GradientStore(url)
    reads.clear()
    assert contents(GradientStore(url).path) == whole(tmp_path, 100)
    assert len(segments(reads)) == len(Objects(url).names("segments")) - 12


@pytest.mark.parametrize("fault", ["changed", "cut", "missing", "manifest"])
def test_what_is_damaged_at_the_address_is_named(fault, bucket, at):
    url = f"{bucket}/{fault}"
    fill(url, 12)
    there = Objects(url)
    folder = "manifests" if fault == "manifest" else "segments"
    name = f"{folder}/{there.names(folder)[-1]}"
    data = there.read(name, 1 << 20)
    if fault == "missing":
        there.remove([name])
    else:
        there.write(name, data[:-1] if fault == "cut" else data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    at("two")
    with pytest.raises(StoreDamagedError, match=f"{url}/{name} is"):
        GradientStore(url)
    problems = bpo.verify_store(url)
    assert len(problems) == 1
    assert f"{url}/{name} is" in problems[0]


def test_a_repair_takes_what_the_copy_has_and_gives_up_the_rest(at, tmp_path):
    url = f"file://{tmp_path}/remote"
    fill(url, 60)
    there = Objects(url)
    rows = snapshot.latest(there).stores[""].rows
    there.write(rows[2].object, b"damaged")
    bpo.repair_store(url, progress=False)  # where a copy is that is sound
    assert bpo.verify_store(url) == []
    at("two")
    assert contents(GradientStore(url).path) == whole(tmp_path, 60)
    at("three")
    lost = snapshot.latest(there).stores[""].rows[2]
    there.remove([lost.object])
    done = bpo.repair_store(url, progress=False)
    assert len(done.set_aside) * 96 == lost.n_bytes > 0
    assert bpo.verify_store(url) == []
    at("four")
    assert GradientStore(url).set_aside.sum() == len(done.set_aside)


def test_of_two_writers_the_one_that_comes_second_is_told_by_whom(url, at, tmp_path):
    at("one")
    said = f"{url}: process {os.getpid()} on .* has put rows there"
    with pytest.raises(StoreLockedError, match=said), upload.writing(url) as (one, _):
        write(one, 20)
        at("two")
        fill(url, 50)
    at("three")
    assert contents(GradientStore(url).path) == whole(tmp_path, 50)
    at("one")
    fill(url, 80)
    assert contents(GradientStore(url).path) == whole(tmp_path, 80)


def test_a_writer_learns_of_another_one_while_it_is_at_work(at, tmp_path, monkeypatch):
    monkeypatch.setattr(upload, "_SECONDS_BETWEEN_UPLOADS", 0.01)
    url = f"file://{tmp_path}/remote"
    with pytest.raises(StoreLockedError, match="has put rows there"), upload.writing(url) as (one, check):
        write(one, 20)
        at("two")
        fill(url, 50)
        write(one, 30)
        for _ in range(2000):
            check()
            upload.threading.Event().wait(0.01)
        pytest.fail("the writer was never told")


def test_one_writer_at_a_time_on_a_machine_and_readers_beside_it(at, tmp_path):
    url = f"file://{tmp_path}/remote"
    fill(url, 20)
    with upload.writing(url) as (directory, _), bpo._core.StoreWriter.append_to(directory):
        with pytest.raises(StoreLockedError, match="another process on this machine"), upload.writing(url):
            pass
        assert len(GradientStore(url)) == 20


def test_rows_that_were_never_sent_are_not_replaced_by_others(at, tmp_path):
    url = f"file://{tmp_path}/remote"
    fill(url, 20)
    path = GradientStore(url).path
    write(path, 40)  # as by a run that died before it sent them
    at("two")
    with upload.writing(url) as (directory, _), bpo._core.StoreWriter.append_to(directory) as writer:
        writer.append(*batch(1000, 1030))
    at("one")
    before = contents(path)
    with pytest.raises(StoreError, match="hold other rows, and those of the copy were never sent"):
        GradientStore(url)
    assert contents(path) == before
    shutil.rmtree(path)
    assert len(GradientStore(url)) == 50


def test_another_store_at_the_address_takes_the_place_of_a_copy(at, tmp_path):
    url = f"file://{tmp_path}/remote"
    fill(url, 40)
    at("two")
    GradientStore(url)
    at("one")
    mirror.remove_store(url)
    with upload.writing(url) as (directory, _):
        write(directory, 10, "int8")
    at("two")
    store = GradientStore(url)
    assert (len(store), store.dtype) == (10, "int8")
    assert "rows.f16" not in contents(store.path)


def test_what_does_not_fit_is_not_begun(url, at, tmp_path, monkeypatch, reads):
    fill(url, 60)
    at("two")
    monkeypatch.setattr(objects.shutil, "disk_usage", lambda path: SimpleNamespace(free=5000))
    with pytest.raises(OSError, match=f"bytes of {url} are to be fetched, and 5,000 are free") as caught:
        GradientStore(url)
    assert caught.value.errno == errno.ENOSPC
    assert segments(reads) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda stores: {"../../x": stores[""]}, "is no store"),
        (lambda stores: {"": {**stores[""], "rows": [{**stores[""]["rows"][0], "name": "../x"}]}}, "is no segment"),
        (lambda stores: {"": {**stores[""], "manifest": "{}"}}, "dtype"),
        (lambda stores: {"": {**stores[""], "count": 10**15}}, "do not agree"),
    ],
)
def test_a_manifest_from_someone_else_names_nothing_else(change, reason, at, tmp_path):
    url = f"file://{tmp_path}/remote"
    fill(url, 10)
    path = next((tmp_path / "remote" / "manifests").iterdir())
    values = json.loads(path.read_text())
    del values["checksum"]
    values["stores"] = change(values["stores"])
    path.write_text(json.dumps({**values, "checksum": snapshot._checksum(values)}))
    at("two")
    with pytest.raises(StoreDamagedError, match=reason):
        GradientStore(url)
    assert not (tmp_path / "two" / "x").exists()


def test_nothing_there(url, at):
    with pytest.raises(FileNotFoundError, match=f"{url} holds no gradient store"):
        GradientStore(url)
    with pytest.raises(FileNotFoundError, match=f"{url} holds no gradient store"):
        bpo.describe_store(url)
    with pytest.raises(FileNotFoundError, match=f"{url} holds no gradient store"):
        bpo.verify_store(url)


def test_a_local_store_that_was_copied_there_is_told_from_one(at, tmp_path):
    write(tmp_path / "remote", 5)
    with pytest.raises(StoreError, match="bpo store merge"):
        GradientStore(f"file://{tmp_path}/remote")


def test_addresses_that_cannot_be_reached(bucket, at, monkeypatch, tmp_path):
    write(tmp_path / "store", 5)
    for call in (GradientStore, bpo.describe_store, lambda url: fill(url, 5)):
        with pytest.raises(FileNotFoundError, match="s3://nowhere/a/manifests: there is no bucket nowhere"):
            call("s3://nowhere/a")
    with pytest.raises(ValueError, match="Protocol not known: xyz"):
        GradientStore("xyz://bucket/a")
    with pytest.raises(ValueError, match="pass an address as text"):
        GradientStore(Path("s3://bucket/a"))
    import fsspec

    fsspec.get_filesystem_class("s3").clear_instance_cache()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(PermissionError, match=r"s3://bucket/a/manifests: Unable to locate credentials.* ~/\.aws"):
        GradientStore("s3://bucket/a")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3")
    with pytest.raises(ImportError, match=r"s3://bucket/a needs a package.*pip install 'balanced-\S+\[remote\]'"):
        GradientStore("s3://bucket/a")


def test_commands_take_addresses(bucket, at, model_path, tmp_path, capsys):
    data, store, output = tmp_path / "rows.jsonl", f"{bucket}/gradients", f"{bucket}/selection"
    data.write_text("".join(json.dumps(row) + "\n" for row in scored_rows(5, 4)))
    arguments = [str(data), "--budget", "0.5", "--output", output]
    assert main(["select", model_path, *arguments, "--store", store, "--set", "sketch_dim=64"]) == 0
    said = capsys.readouterr().out
    assert "15 kept of 30" in said
    assert f"report   {output}/report.html" in said
    first = bpo.Selection.load(output)
    at("two")
    assert main(["reselect", store, *arguments]) == 1
    assert "holds an earlier selection" in capsys.readouterr().err
    assert main(["reselect", store, *arguments, "--overwrite"]) == 0
    assert "15 kept of 30" in capsys.readouterr().out
    again = bpo.Selection.load(output)
    assert again.pairs["fate"] == first.pairs["fate"]
    assert len(Objects(output).names("saves")) == 1
    at("three")
    assert main(["show", output]) == 0
    assert "15 kept of 30" in capsys.readouterr().out
    for arguments in (["show", store], ["store", "info", store]):
        assert main(arguments) == 0
        assert "20 responses of 5 prompts" in capsys.readouterr().out
    assert main(["store", "verify", store]) == 0
    assert f"{store}: all 20 rows are as they were written" in capsys.readouterr().out
    assert not (tmp_path / "three").exists()  # nothing of that needs the sketches here
    assert main(["store", "repair", store]) == 0
    assert "nothing to mend" in capsys.readouterr().out
    assert main(["store", "merge", f"{bucket}/merged", store, "--dtype", "int8"]) == 0
    assert "20 responses of 64 int8" in capsys.readouterr().out
    assert main(["store", "merge", store, store]) == 1
    assert "are the same" in capsys.readouterr().err
    assert main(["store", "export", store, str(tmp_path / "rows.npz")]) == 0
    assert np.load(tmp_path / "rows.npz")["sketch"].shape == (20, 64)
    preview = ["preview", store, str(data), "--budget", "4", "--seeds", "2", "--arm", "bpo", "--arm", "random"]
    assert main(preview) == 0
    assert main(["select", model_path, str(data), "--budget", "5", "--output", f"{bucket}/gradients"]) == 1
    assert f"{bucket}/gradients is not empty and holds no selection" in capsys.readouterr().err


def test_checkpoints_and_rounds_have_stores_of_their_own_below_an_address():
    config = bpo.SelectConfig(checkpoints={"runs/checkpoint-5": 1e-5})
    assert _directories(config, "s3://bucket/a/") == ["s3://bucket/a/0-checkpoint-5"]
    assert _directories(config, "a") == [Path("a/0-checkpoint-5")]
    assert store_of(2, "s3://bucket/a") == "s3://bucket/a/round-002"
    assert store_of(2, "a") == Path("a/round-002")


def test_a_writer_that_is_killed_while_it_sends_loses_nothing_that_counts(bucket, at, tmp_path):
    """Killed at any moment, and started again on a machine with nothing, it ends with the same bytes."""
    total, url = 200, f"{bucket}/killed"
    generator = np.random.default_rng(0)
    kills = machines = counted = 0
    finished = False
    while not finished:
        wanted = generator.integers(2, 12) if kills < (TORTURE or 4) else 10**9
        at(f"machine-{machines}")
        machines += 1
        process = subprocess.Popen(
            [sys.executable, str(WRITER), url, str(total), "0.002"], stdout=subprocess.PIPE, text=True, bufsize=1
        )
        for line in process.stdout:
            wanted -= line == "put\n"
            if wanted <= 0:
                process.kill()
                break
        finished = process.wait() == 0
        kills += not finished
        at("reader")
        there = snapshot.latest(Objects(url))
        if there is not None and "" in there.stores:
            store = GradientStore(url)
            assert len(store.verify()) == 0
            assert len(store) >= counted
            counted = len(store)
    assert kills >= 2
    at("elsewhere")
    assert contents(GradientStore(url).path) == whole(tmp_path, total)
    assert segments(f"segments/{name}" for name in Objects(url).names("segments")) == sorted(
        snapshot.latest(Objects(url)).segments()
    )
