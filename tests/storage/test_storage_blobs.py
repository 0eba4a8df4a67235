"""Originals: what was put comes back, nothing half written shows, and only what nobody names is removed."""

from __future__ import annotations

import hashlib
import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import ContentNotFound, StorageFull, StorageUnavailable
from service.storage.blobs import SYNC_TOGETHER_FROM, Blobs

DAY_S = 24 * 3600

LIMITED = """
import resource, sys
from pathlib import Path
from service.errors import StorageFull
from service.storage.blobs import Blobs
blobs = Blobs(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
small = blobs.put(b"s" * 1000)
try:
    blobs.put(b"l" * 1001)
except StorageFull as error:
    print(small, error.detail)
"""


def age(blobs, hash_, seconds):
    path = next(blobs._root.rglob(hash_))
    os.utime(path, (time.time() - seconds,) * 2)
    return path


def files(blobs):
    return [path for path in blobs._root.rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return Blobs(tmp_path_factory.mktemp("shared"))


@given(contents=st.lists(st.binary(max_size=50), max_size=2 * SYNC_TOGETHER_FROM))
def test_what_was_put_comes_back(shared, contents):
    hashes = shared.put_many(contents)
    assert hashes == [hashlib.sha256(content).hexdigest() for content in contents]
    assert [shared.get(hash_) for hash_ in hashes] == contents


def test_equal_contents_are_one_file_and_nothing_is_left_of_the_writing(tmp_path):
    blobs = Blobs(tmp_path)
    hashes = blobs.put_many([b"a", b"b", b"a"])
    assert hashes[0] == hashes[2] == blobs.put(b"a")
    assert sorted(path.name for path in files(blobs)) == sorted(set(hashes))


@pytest.mark.parametrize("count", [1, SYNC_TOGETHER_FROM])
def test_existing_blob_is_not_written_again_but_made_young(tmp_path, count):
    blobs = Blobs(tmp_path)
    contents = [bytes([i]) * 10 for i in range(count)]
    paths = [age(blobs, hash_, DAY_S) for hash_ in blobs.put_many(contents)]
    inodes = [path.stat().st_ino for path in paths]
    blobs.put_many([*contents, b"new"])
    assert [path.stat().st_ino for path in paths] == inodes
    assert all(path.stat().st_mtime > time.time() - 60 for path in paths)


def test_missing_blob(tmp_path):
    blobs = Blobs(tmp_path)
    kept = blobs.put(b"")
    assert blobs.exists(kept)
    assert blobs.get(kept) == b""
    assert not blobs.exists("0" * 64)
    with pytest.raises(ContentNotFound, match="000"):
        blobs.get("0" * 64)


def test_files_that_a_crash_left_half_written_are_removed_at_open(tmp_path):
    kept = Blobs(tmp_path).put(b"kept")
    for name in ("half", "of another process"):
        (tmp_path / "tmp" / name).write_bytes(b"ha")
    os.utime(tmp_path / "tmp" / "half", (0, 0))
    blobs = Blobs(tmp_path)
    assert sorted(path.name for path in files(blobs)) == sorted([kept, "of another process"])


def test_only_old_unreferenced_blobs_are_removed(tmp_path):
    blobs = Blobs(tmp_path)
    young, old, used = blobs.put_many([b"young", b"old", b"used"])
    for hash_ in (old, used):
        age(blobs, hash_, DAY_S)
    asked = []

    def in_use(hashes):
        asked.extend(hashes)
        return {used}

    assert blobs.remove_unreferenced(in_use) == 1
    assert sorted(asked) == sorted([old, used])
    assert (blobs.exists(young), blobs.exists(old), blobs.exists(used)) == (True, False, True)
    assert blobs.remove_unreferenced(in_use, older_than_s=0) == 1
    assert not blobs.exists(young)


def test_blob_put_again_while_it_is_judged_is_kept(tmp_path):
    blobs = Blobs(tmp_path)
    hash_ = blobs.put(b"wanted again")
    age(blobs, hash_, DAY_S)

    def in_use(_hashes):
        blobs.put(b"wanted again")
        return ()

    assert blobs.remove_unreferenced(in_use) == 0
    assert blobs.get(hash_) == b"wanted again"


@pytest.mark.parametrize("count", [1, SYNC_TOGETHER_FROM])
def test_full_disk_is_reported_and_harms_nothing(mount, count):
    blobs = Blobs(mount("size=1m") / "blobs")
    kept = blobs.put_many([b"first", b"second"])
    with pytest.raises(StorageFull, match="No space left"):
        blobs.put_many([bytes([i]) * (2**21 // count) for i in range(count)])
    assert [blobs.get(hash_) for hash_ in kept] == [b"first", b"second"]
    assert sorted(path.name for path in files(blobs)) == sorted(kept)
    assert blobs.exists(blobs.put(b"x" * 2**18))  # the space that the failure took is free again


def test_limit_on_file_sizes_is_reported(tmp_path, spawn):
    child = spawn(LIMITED, tmp_path)
    small, detail = child.communicate()[0].split(maxsplit=1)
    assert "File too large" in detail
    assert [path.name for path in files(Blobs(tmp_path))] == [small]


def test_unusable_place_is_reported(tmp_path, unprivileged):
    (tmp_path / "file").touch()
    with pytest.raises(StorageUnavailable):
        Blobs(tmp_path / "file")
    blobs = Blobs(tmp_path / "blobs")
    kept = blobs.put(b"kept")
    (tmp_path / "blobs").chmod(0)
    with unprivileged():
        with pytest.raises(StorageUnavailable, match="Permission denied"):
            blobs.put(b"more")
        with pytest.raises(StorageUnavailable, match="Permission denied"):
            blobs.get(kept)
    (tmp_path / "blobs").chmod(0o700)
    assert blobs.get(kept) == b"kept"
