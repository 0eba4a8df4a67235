"""One owner per data folder: who holds it is named, and the lock dies with its process and with nothing else."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from service.errors import FolderInUse, StorageUnavailable
from service.storage.folder import DataFolder, Owner, read_owner

HOLD = """
import sys, time
from service.storage.folder import DataFolder
folder = DataFolder.open(sys.argv[1], url="http://127.0.0.1:8123")
print("owned", flush=True)
time.sleep(600)
"""

HOLD_WITH_CHILDREN = """
import os, subprocess, sys, time
from service.storage.folder import DataFolder
folder = DataFolder.open(sys.argv[1])
forked = os.fork()
if forked == 0:
    os.close(1)
    time.sleep(600)
executed = subprocess.Popen(["sleep", "600"], close_fds=False, stdout=subprocess.DEVNULL)
print(forked, executed.pid, flush=True)
time.sleep(600)
"""


def test_folder_is_created_and_says_who_owns_it(tmp_path):
    path = tmp_path / "a" / "b ü%20"
    assert read_owner(path) is None
    folder = DataFolder.open(path, url="http://127.0.0.1:1")
    assert folder.database_path.parent == folder.blobs_path.parent == folder.path == path
    assert read_owner(path) == Owner(os.getpid(), "http://127.0.0.1:1")
    record = {"pid": os.getpid(), "url": "http://127.0.0.1:1", "grpc_url": None}
    assert json.loads((path / "owner.lock").read_text()) == record
    folder.announce(None)
    assert read_owner(path) == Owner(os.getpid(), None)
    folder.announce("http://127.0.0.1:22")
    assert read_owner(path) == Owner(os.getpid(), "http://127.0.0.1:22")
    folder.close()
    folder.close()
    assert read_owner(path) is None
    with pytest.raises(ValueError, match="closed"):
        folder.announce("http://127.0.0.1:1")


def test_relative_path_stays_where_it_was_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = DataFolder.open("data")
    assert folder.path == tmp_path / "data"
    folder.close()


def test_second_opening_in_the_same_process_is_refused(tmp_path):
    folder = DataFolder.open(tmp_path)
    with pytest.raises(FolderInUse, match=rf"process {os.getpid()} owns it\.$"):
        DataFolder.open(tmp_path)
    assert read_owner(tmp_path) == Owner(os.getpid(), None)  # the refusal harmed nothing
    folder.close()


def test_other_process_is_named_and_its_kill_frees_the_folder(tmp_path, spawn):
    holder = spawn(HOLD, tmp_path)
    assert holder.stdout.readline() == "owned\n"
    with pytest.raises(FolderInUse, match=rf"process {holder.pid} owns it and serves at http://127.0.0.1:8123\."):
        DataFolder.open(tmp_path)
    assert read_owner(tmp_path) == Owner(holder.pid, "http://127.0.0.1:8123")
    holder.kill()
    holder.wait()
    assert (tmp_path / "owner.lock").read_text().strip()  # stale, and not believed
    assert read_owner(tmp_path) is None
    folder = DataFolder.open(tmp_path)
    assert read_owner(tmp_path) == Owner(os.getpid(), None)
    folder.close()


def test_children_of_a_killed_owner_do_not_hold_the_folder(tmp_path, spawn):
    holder = spawn(HOLD_WITH_CHILDREN, tmp_path)
    children = [int(pid) for pid in holder.stdout.readline().split()]
    try:
        assert read_owner(tmp_path) == Owner(holder.pid, None)  # the child that let go did not free its parent's lock
        holder.kill()
        holder.wait()
        for child in children:
            os.kill(child, 0)
        folder = DataFolder.open(tmp_path)
        folder.close()
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("path", ["file", "file/below"])
def test_file_in_the_way_is_refused(tmp_path, path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageUnavailable, match="cannot be used"):
        DataFolder.open(tmp_path / path)
    assert (tmp_path / "file").read_text() == "mine"


def test_folder_without_permission_is_refused(tmp_path, unprivileged):
    (tmp_path / "parent").mkdir(mode=0o500)
    with unprivileged(), pytest.raises(StorageUnavailable, match="Permission denied"):
        DataFolder.open(tmp_path / "parent" / "data")
    with unprivileged(), pytest.raises(StorageUnavailable, match="Permission denied"):
        DataFolder.open(tmp_path / "parent")


def test_read_only_file_system_is_refused(mount):
    with pytest.raises(StorageUnavailable, match="Read-only file system"):
        DataFolder.open(mount("size=1m,ro") / "data")


def test_owner_of_an_unreadable_folder_is_an_error_not_nobody(tmp_path, unprivileged):
    closed = Path(tmp_path) / "closed"
    folder = DataFolder.open(closed)
    closed.chmod(0)
    with unprivileged(), pytest.raises(StorageUnavailable, match="cannot be read"):
        read_owner(closed)
    closed.chmod(0o700)
    folder.close()
