"""Disks that are full, over quota, read-only or gone: an error that names the file, and nothing committed is lost."""

import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

import bpo
from bpo import GradientStore, _core
from disks import image, run
from store_writer import DIM, batch, check, contents, write
from tiny import scored_rows, stored

TOTAL = 3000


def write_until_it_fails(path, dtype="float32"):
    """Writes rows until the disk refuses; returns the error and how many rows were committed before."""
    committed = 0
    with pytest.raises(OSError) as caught:
        new = not path.exists()
        with (
            _core.StoreWriter.create(path, DIM, "{}", dtype=dtype)
            if new
            else _core.StoreWriter.append_to(path) as writer
        ):
            for first in range(len(writer), 1 << 20, 64):
                writer.append(*batch(first, first + 64))
                writer.commit()
                committed = writer.committed
    return caught.value, committed


@pytest.mark.parametrize("kind", ["tmpfs", "ext4", "btrfs quota"])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_full_disk_keeps_what_is_committed_and_goes_on_with_more_room(mount, tmp_path, kind, dtype):
    if kind == "tmpfs":
        disk, code = mount("-t", "tmpfs", "-o", "size=400k", "tmpfs"), errno.ENOSPC
    elif kind == "ext4":
        disk, code = mount("-o", "loop", image(tmp_path / "disk", 4 << 20, ["mkfs.ext4", "-q"])), errno.ENOSPC
    else:
        disk, code = mount("-o", "loop", image(tmp_path / "disk", 128 << 20, ["mkfs.btrfs", "-q"])), errno.EDQUOT
        run("btrfs", "quota", "enable", disk)
        run("btrfs", "subvolume", "create", disk / "user")
        run("btrfs", "qgroup", "limit", "2M", disk / "user")
        disk = disk / "user"
    path = disk / "store"
    error, committed = write_until_it_fails(path, dtype)
    assert error.errno == code
    assert Path(error.filename).parent == path and Path(error.filename).name.startswith(("rows.", "records."))
    assert "those before are kept" in error.strerror or f"the {committed} committed rows are kept" in error.strerror
    assert 0 < committed == check(path, 1 << 20, committed)

    # As it is, the store can be read and told from; with more room, writing goes on.
    again, same = write_until_it_fails(path)
    assert again.errno == code and check(path, 1 << 20, max(same, committed)) >= committed
    if kind == "tmpfs":
        run("mount", "-o", "remount,size=8m", disk)
    elif kind == "ext4":
        shutil.move(path, tmp_path / "store")
        path = tmp_path / "store"
    else:
        run("btrfs", "qgroup", "limit", "none", disk)
    total = len(GradientStore.open(path)) + TOTAL
    writer = _core.StoreWriter.append_to(path)
    with writer:
        writer.append(*batch(len(writer), total))
    with _core.StoreWriter.create(tmp_path / "whole", DIM, "{}", dtype=dtype) as writer:
        writer.append(*batch(0, total))
    assert contents(path) == contents(tmp_path / "whole")


def test_a_full_disk_stops_an_extraction_with_a_sentence_and_it_goes_on_later(mount, model, tokenizer):
    disk = mount("-t", "tmpfs", "-o", "size=60k", "tmpfs")
    rows = scored_rows(30, 6)
    settings = {"sketch_dim": 128, "sketch_dtype": "float32", "tokens_per_batch": 100}
    with pytest.raises(OSError, match=r"No space left on device while \w+ .*rows.* are kept: '.*mount-0/store/"):
        stored(model, rows, tokenizer, disk / "store", **settings)
    kept = len(GradientStore.open(disk / "store"))
    assert 0 < kept < 180
    run("mount", "-o", "remount,size=8m", disk)
    store = stored(model, rows, tokenizer, disk / "store", **settings)
    assert len(store) == 180
    whole = stored(model, rows, tokenizer, **settings)
    np.testing.assert_array_equal(store.rows[:kept], whole.rows[:kept])


def test_no_room_for_a_store_leaves_none(mount):
    disk = mount("-t", "tmpfs", "-o", "size=4k", "tmpfs")
    with pytest.raises(OSError, match="No space left on device"):
        _core.StoreWriter.create(disk / "store", DIM, '{"long": "' + "x" * 9000 + '"}')
    with pytest.raises(FileNotFoundError):
        GradientStore.open(disk / "store")
    run("mount", "-o", "remount,size=1m", disk)
    write(disk / "store", 3)
    assert check(disk / "store", 3, 3) == 3


def test_a_read_only_disk_serves_and_is_not_written_to(mount, model, tokenizer):
    disk = mount("-t", "tmpfs", "-o", "size=2m", "tmpfs")
    rows = scored_rows(4, 3)
    stored(model, rows, tokenizer, disk / "store")
    run("mount", "-o", "remount,ro", disk)
    assert len(stored(model, rows, tokenizer, disk / "store")) == 12
    arguments = {"budget": 6, "store": disk / "store", "progress": False}
    assert len(bpo.select(None, rows, **arguments)) == 6
    for use in (
        lambda: stored(model, scored_rows(5, 3), tokenizer, disk / "store"),
        lambda: stored(model, rows, tokenizer, disk / "other"),
        lambda: bpo.repair_store(disk / "store", progress=False),
        lambda: bpo.Selection.save(bpo.select(None, rows, **arguments), disk / "selection"),
    ):
        with pytest.raises(OSError, match=r"Read-only file system.*mount-0") as caught:
            use()
        assert caught.value.errno == errno.EROFS


def test_a_full_disk_keeps_the_selection_that_was_saved_before(mount, model, tokenizer, tmp_path):
    disk = mount("-t", "tmpfs", "-o", "size=64k", "tmpfs")
    stored(model, scored_rows(30, 6), tokenizer, tmp_path / "store")
    arguments = {"store": tmp_path / "store", "progress": False}
    bpo.select(None, scored_rows(2, 6), budget=4, **arguments).save(disk / "selection")
    kept = contents(disk / "selection")
    with pytest.raises(OSError) as caught:
        bpo.select(None, scored_rows(30, 6), budget=400, **arguments).save(disk / "selection")
    assert caught.value.errno == errno.ENOSPC
    assert contents(disk / "selection") == kept
    assert len(bpo.Selection.load(disk / "selection")) == 4


def test_a_directory_of_another_user_is_refused_by_name():
    if os.name != "posix" or os.geteuid() != 0:
        pytest.skip("becoming another user needs root")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "store"
        write(path, 3)
        for place in (path, path.parent):
            place.chmod(0o755)
        code = f"""
import os
from bpo._core import StoreReader, StoreWriter
os.setuid(65534)
assert len(StoreReader({str(path)!r})) == 3
try:
    StoreWriter.append_to({str(path)!r})
except PermissionError as error:
    print(error)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"Permission denied: '{path}/lock'" in done.stdout


def test_a_disk_that_fails_to_write_keeps_what_is_committed(mount, tmp_path):
    """A thin disk: the file system has room, what is behind it has not, and says so when the data is synced."""
    thin = mount("-t", "tmpfs", "-o", "size=3m", "tmpfs")
    disk = mount("-o", "loop", image(thin / "disk", 64 << 20, ["mkfs.ext4", "-q", "-E", "lazy_itable_init=1"]))
    error, committed = write_until_it_fails(disk / "store")
    assert error.errno in (errno.EIO, errno.EROFS) and Path(error.filename).parent == disk / "store"
    assert "are kept" in error.strerror
    # The same disk with room behind it again, as after it came back.
    run("umount", "-l", disk)
    run("mount", "-o", "remount,size=80m", thin)
    disk = mount("-o", "loop", thin / "disk")
    assert check(disk / "store", 1 << 20, committed) >= committed
    with _core.StoreWriter.append_to(disk / "store") as writer:
        writer.append(*batch(len(writer), len(writer) + 10))


def test_a_mount_that_is_gone_is_named(mount):
    disk = mount("-t", "tmpfs", "-o", "size=2m", "tmpfs")
    write(disk / "store", 50)
    store = GradientStore.open(disk / "store")
    run("umount", "-l", disk)
    with pytest.raises(FileNotFoundError, match=r"rows\.f16"):
        store.verify()
    with pytest.raises(FileNotFoundError, match="holds no gradient store"):
        GradientStore.open(disk / "store")


def test_the_tests_that_the_table_of_faults_names_are_there():
    tests = Path(__file__).parents[2]
    page = (tests.parent / "docs" / "store-format.md").read_text(encoding="utf-8")
    rows = page.partition("| fault |")[2].partition("\n\n")[0].splitlines()[2:]
    named = re.findall(r"`(\w+\.(?:py|rs))`|`(\w+?)_?…?`", " ".join(row.split("|")[-2] for row in rows))
    assert len(rows) == 17 and len(named) > 30
    text = ""
    for file, name in named:
        if file:
            (path,) = tests.glob(f"python/*/{file}" if file.endswith(".py") else f"rust/{file}")
            text = path.read_text(encoding="utf-8")
        else:
            assert re.search(rf"(def|fn) {name}", text), name
