"""What may be read, what may be replaced, and what a file is like afterwards."""

import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from chai_attention import atomic_write
from chai_attention.atomic_write import (
    read_whole,
    require_file,
    require_folder,
    require_other,
    write_whole,
)
from chai_attention.errors import FileError


def write(path, content=b"new"):
    write_whole(path, content, FileError)


@pytest.fixture
def fifo(tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


@pytest.fixture
def unix_socket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # such a name may have 100 characters
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
        yield tmp_path / "socket"


@pytest.fixture
def device(tmp_path, monkeypatch):
    """A file that the system calls a device."""
    path = tmp_path / "device"
    path.write_text("old")
    real = os.stat

    def told(name, *args, **kwargs):
        found = real(name, *args, **kwargs)
        if os.fspath(name) != str(path):
            return found
        return os.stat_result((stat.S_IFCHR | 0o666, *found[1:]))

    monkeypatch.setattr(atomic_write.os, "stat", told)
    return path


def refused_everywhere(path, word):
    before = os.lstat(path)
    for call in (write, lambda out: require_file(out, FileError)):
        with pytest.raises(FileError, match=word) as caught:
            call(path)
        assert str(path) in str(caught.value)
    with pytest.raises(OSError, match=word):
        within_seconds(lambda: read_whole(path, 100))
    after = os.lstat(path)
    assert (before.st_mode, before.st_ino) == (after.st_mode, after.st_ino)
    assert not list(path.parent.glob(".chai-*"))


def within_seconds(call, seconds=20):
    """What ``call`` raises, unless it hangs."""
    raised = []

    def run():
        try:
            call()
        except OSError as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it waits for ever"
    if raised:
        raise OSError(raised[0].strerror)


def test_a_fifo_is_neither_replaced_nor_waited_for(fifo):
    refused_everywhere(fifo, "a FIFO")


def test_a_socket_is_not_replaced(unix_socket):
    refused_everywhere(unix_socket, "a socket")


def test_a_device_node_is_not_replaced(device):
    refused_everywhere(device, "a device")
    assert device.read_text() == "old"


def test_a_link_to_a_fifo_is_not_replaced(fifo, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(fifo)
    refused_everywhere(link, "a FIFO")
    assert link.is_symlink()


def test_a_link_stays_and_what_it_names_is_written(tmp_path):
    (tmp_path / "deep").mkdir()
    target, link, second = (tmp_path / name for name in ("deep/target", "link", "second"))
    target.write_text("old")
    link.symlink_to(Path("deep") / "target")
    second.symlink_to("link")
    write(second)
    assert (os.readlink(second), os.readlink(link)) == ("link", "deep/target")
    assert target.read_bytes() == second.read_bytes() == b"new"
    target.unlink()
    write(link)  # a link to nothing yet
    assert target.read_bytes() == b"new"


def test_a_loop_of_links_is_told(tmp_path):
    for name, to in (("a", "b"), ("b", "a")):
        (tmp_path / name).symlink_to(tmp_path / to)
    refused_everywhere(tmp_path / "a", "symbolic links")
    with pytest.raises(FileError, match="symbolic links"):
        require_folder(tmp_path / "a" / "new", FileError)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_a_replaced_file_keeps_its_mode(tmp_path, mode):
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(mode)
    write(path)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_has_the_mode_that_the_umask_leaves(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write(tmp_path / "file")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_a_replaced_file_keeps_its_owner(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")
    given = []
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    monkeypatch.setattr(os, "fchown", lambda file, *owner: given.append(owner))
    write(path)
    assert given == [(path.stat().st_uid, path.stat().st_gid)]


def test_names_of_any_length_that_a_disk_takes(tmp_path):
    longest = tmp_path / ("n" * 255)
    write(longest)
    assert longest.read_bytes() == b"new"


@pytest.mark.parametrize("name", ["n" * 256, "/".join(["n" * 200] * 30), "a\0b"])
def test_names_that_no_disk_takes_are_one_line(tmp_path, name):
    path = tmp_path / name
    for call in (
        write,
        lambda out: write_whole(out, b"", FileError, make_folder=True),
        lambda out: require_file(out, FileError),
        lambda out: require_file(out, FileError, make_folder=True),
        lambda out: require_folder(out, FileError),
    ):
        with pytest.raises(FileError, match="cannot write"):
            call(path)
    with pytest.raises(OSError, match=r"."):
        read_whole(path, 10)
    assert not list(tmp_path.iterdir())


def test_checks_write_nothing(tmp_path):
    require_file(tmp_path / "new", FileError)
    require_file(tmp_path / "a" / "b" / "new", FileError, make_folder=True)
    require_folder(tmp_path / "c" / "d", FileError, ("e.json",))
    (tmp_path / "old").write_text("old")
    require_file(tmp_path / "old", FileError)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_text() == "old"


def test_places_that_cannot_be_written_are_told_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "taken.json").mkdir()
    for call, word in (
        (lambda: require_file(tmp_path / "none" / "x", FileError), "no folder"),
        (lambda: require_file(tmp_path / "folder", FileError), "it is a folder"),
        (lambda: require_file(tmp_path / "file" / "x", FileError), "ot a directory|no folder"),
        (lambda: require_folder(tmp_path / "file", FileError), "is no folder"),
        (lambda: require_folder(tmp_path / "file" / "x", FileError), "cannot write to"),
        (lambda: require_folder(tmp_path / "folder", FileError, ("taken.json",)), "a folder"),
    ):
        with pytest.raises(FileError, match=word):
            call()


def test_a_read_only_disk_is_told_before_the_work(tmp_path, monkeypatch):
    """Root may write anywhere but there, so the system's answer is what counts."""
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path))
    for call in (
        lambda: require_file(tmp_path / "x", FileError),
        lambda: require_file(tmp_path / "new" / "x", FileError, make_folder=True),
        lambda: require_folder(tmp_path / "new", FileError),
    ):
        with pytest.raises(FileError, match="write-protected"):
            call()


def test_a_write_protected_file_is_not_replaced_through_its_folder(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(os, "access", lambda name, mode: str(name) != str(path))
    for call in (write, lambda out: require_file(out, FileError)):
        with pytest.raises(FileError, match="write-protected"):
            call(path)
    assert path.read_text() == "old"


def test_an_input_is_not_an_output_by_any_name(tmp_path):
    text, link = tmp_path / "text", tmp_path / "link"
    text.write_text("old")
    link.symlink_to(text)
    for output in (text, link, tmp_path / "x" / ".." / "text"):
        with pytest.raises(FileError, match="read by this command"):
            require_other([output], ["self", str(text), "a\0b"], FileError)
    with pytest.raises(FileError, match="also where"):
        require_other([tmp_path / "out", tmp_path / "." / "out"], [], FileError)
    require_other([tmp_path / "out"], [str(text)], FileError)


def test_files_that_are_too_large_are_not_read(tmp_path):
    with open(tmp_path / "file", "wb") as file:
        file.truncate(2**40)  # of no size on the disk
    with pytest.raises(OSError, match=r"1,099,511,627,776 bytes are more than 100"):
        read_whole(tmp_path / "file", 100)
