"""Files by path or URL: whole or absent, one kind of error, a limit on what is read."""

import errno
import io
import os
import pickle
from pathlib import Path

import fsspec
import pytest

from xlstm_io import storage
from xlstm_io.errors import PrepError
from xlstm_io.new_file import create_new
from xlstm_io.remote import RemotePath, file_system, is_remote, os_errors
from xlstm_io.storage import (
    absolute,
    file_size,
    files,
    location,
    open_file,
    read_file,
    remove_temporaries,
    replacing,
    temporary_path,
    write_atomic,
)


@pytest.mark.parametrize("links", [True, False], ids=["links", "without hard links"])
def test_a_file_that_is_made_once_is_never_torn_or_taken_for_anothers(tmp_path, monkeypatch, links):
    path, link = tmp_path / "000001.json", os.link

    def answer_lost(old, new):
        """A network file system asks again, and finds the link that the first request made."""
        if not links:
            raise OSError(errno.EPERM, "no links here")
        link(old, new)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new))

    def full(descriptor, sync=os.fsync):
        if path.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "link", answer_lost)
    if not links:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            create_new(path, b"one")
        assert [*tmp_path.iterdir()] == []
        monkeypatch.undo()
        monkeypatch.setattr(os, "link", answer_lost)
    create_new(path, b"one")
    with pytest.raises(FileExistsError):
        create_new(path, b"another")
    assert [*tmp_path.iterdir()] == [path] and path.read_bytes() == b"one"


@pytest.mark.parametrize("links", [True, False], ids=["links", "without hard links"])
def test_a_file_that_is_made_once_is_on_the_disk(tmp_path, monkeypatch, links):
    """After a loss of power the record of a life was empty, and the run refused to go on."""
    synced = []

    def sync(descriptor, real=os.fsync):
        place = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced.append((tmp_path / "one").exists() if place.is_dir() else place.read_bytes())
        real(descriptor)

    def refuse(old, new):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "fsync", sync)
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    create_new(tmp_path / "one", b"all of it")
    assert synced == [b"all of it"] * (1 if links else 2) + [True]


def test_a_link_to_nothing_is_there_already(tmp_path):
    path = tmp_path / "one"
    path.symlink_to("nowhere")
    with pytest.raises(FileExistsError):
        create_new(path, b"another")
    assert [*tmp_path.iterdir()] == [path]


@pytest.fixture(params=["local", "remote"])
def place(request, tmp_path):
    """A file that does not exist yet, on either kind of storage."""
    if request.param == "local":
        return tmp_path / "folder" / "file.json"
    return location(f"memory://{tmp_path}/folder/file.json")


def test_a_file_that_goes_while_its_folder_is_listed_is_not_there(tmp_path, monkeypatch):
    """A life that looks whether it is the newest would end because another one has just begun."""
    for name in ("stays", "goes"):
        write_atomic(tmp_path / name, b"12")
    listed = [*os.scandir(tmp_path)]
    (tmp_path / "goes").unlink()
    monkeypatch.setattr(os, "scandir", lambda path: listed)
    assert {name: size for name, (size, _) in files(tmp_path).items()} == {"stays": 2}


def test_a_file_is_written_and_read_back(place):
    write_atomic(place, b"first")
    write_atomic(place, b"second")
    assert read_file(place, 6) == b"second" and file_size(place) == 6
    with open_file(place) as file:
        assert file.read(3) == b"sec"


def test_a_file_over_the_limit_is_not_read(place):
    write_atomic(place, b"123456")
    with pytest.raises(OSError, match="6 bytes or more; more than 5 are not read"):
        read_file(place, 5)


def test_a_reader_of_many_files_keeps_few_of_them_open(tmp_path):
    paths = [tmp_path / f"data-{number:05d}" for number in range(4 * storage.OPEN_FILES)]
    for number, path in enumerate(paths):
        path.write_bytes(b"%05d" % number)

    def opened():
        return len(os.listdir("/proc/self/fd"))

    reader, before, most = storage.RangeReader(), opened(), 0
    for number in [*range(len(paths)), 0, *reversed(range(len(paths)))]:
        part = bytearray(4)
        reader.read_into(paths[number], 1, memoryview(part))
        assert int(part) == number
        most = max(most, opened() - before)
    assert most == storage.OPEN_FILES
    paths[0].unlink()
    reader.read_into(paths[0], 1, memoryview(part))  # the last one is still open
    reader.close()
    assert opened() == before


def test_a_file_that_is_not_there(place):
    for act in (lambda: read_file(place, 9), lambda: file_size(place), lambda: open_file(place)):
        with pytest.raises(FileNotFoundError):
            act()


def test_a_file_of_unknown_size_is_read_up_to_the_limit(tmp_path, monkeypatch):
    place = location(f"memory://{tmp_path}/stream")
    write_atomic(place, b"x" * 3_000_000)
    monkeypatch.setattr(type(place.fs), "size", lambda self, path: None)
    assert len(read_file(place, 3_000_000)) == 3_000_000
    with pytest.raises(OSError, match="are not read"):
        read_file(place, 2_999_999)


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_only_plain_files_are_read(tmp_path, kind):
    path = tmp_path / "file"
    (tmp_path / "real").write_bytes(b"data")
    if kind == "link":
        path.symlink_to("real")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(OSError, match="not a plain file"):
        read_file(path, 99)
    if kind == "link":
        assert read_file(path, 99, links=True) == b"data"
    else:
        with pytest.raises(OSError, match="not a plain file"):
            read_file(path, 99, links=True)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, step, full)
        with pytest.raises(OSError, match="No space left"):
            write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_block_that_raises_replaces_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write(b"half")
        assert len(list(tmp_path.iterdir())) == 2
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_without_parents_a_folder_that_is_gone_stays_gone(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "gone" / "file", b"", make_parents=False)
    assert not (tmp_path / "gone").exists()


def test_what_was_written_is_on_the_disk(tmp_path, monkeypatch):
    """The file before its new name, then the folder that holds the name."""
    calls = []
    real_sync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(
        storage.os,
        "fsync",
        lambda fd: (calls.append(Path(f"/proc/self/fd/{fd}").readlink()), real_sync(fd)),
    )
    monkeypatch.setattr(
        storage.os, "replace", lambda old, new: (calls.append("rename"), real_replace(old, new))
    )
    write_atomic(tmp_path / "file", b"data")
    assert calls == [temporary_path(tmp_path / "file"), "rename", tmp_path]
    calls.clear()
    write_atomic(tmp_path / "file", b"data", sync=False)
    assert calls == ["rename"]


def test_temporaries_of_killed_processes_are_removed(tmp_path):
    (tmp_path / "a").mkdir()
    left = temporary_path(tmp_path / "a" / "file")
    left.write_bytes(b"half")
    (tmp_path / "a" / "file").write_bytes(b"whole")
    remove_temporaries(tmp_path)
    assert not left.exists() and (tmp_path / "a" / "file").exists()


# --- URLs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "remote"),
    [
        ("s3://bucket/a.jsonl", True),
        ("memory://a", True),
        ("zip://*.jsonl::archive.zip", True),
        ("zip::s3://bucket/a.zip", True),
        ("file:///a", True),
        ("/data/a", False),
        ("a:b", False),
        ("data/odd://name", False),
        (Path("/data"), False),
        (RemotePath("s3://bucket"), True),
    ],
)
def test_what_is_a_url(path, remote):
    assert is_remote(path) is remote


def test_places():
    assert isinstance(location("s3://a/b"), RemotePath)
    assert location("file:///a/b") == Path("/a/b") and location("a/b") == Path("a/b")
    path = RemotePath("s3://a/b/c/")
    assert (path.name, str(path.parent), str(path / "d")) == ("c", "s3://a/b", "s3://a/b/c/d")
    assert pickle.loads(pickle.dumps(path)) == path and len({path, RemotePath(str(path))}) == 1


def test_every_failure_of_a_backend_is_an_os_error():
    for error, message in (
        (RuntimeError("SlowDown"), "s3://a: RuntimeError: SlowDown"),
        (ImportError("Install s3fs to access S3"), "s3://a: Install s3fs"),
        (ValueError("Protocol not known: x"), "s3://a: Protocol not known: x; install its fsspec"),
        (ValueError("bad"), "s3://a: ValueError: bad"),
    ):
        with pytest.raises(OSError, match=message), os_errors("s3://a"):
            raise error


def test_errors_of_the_system_and_of_users_stay_as_they_are():
    for error in (FileNotFoundError("x"), PrepError("y"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, os_errors("s3://a"):
            raise error
        assert caught.value is error


def test_a_forked_process_opens_a_file_system_of_its_own(monkeypatch):
    path = RemotePath("memory://bucket/a")
    assert path.fs is path.fs
    calls = []
    monkeypatch.setattr(
        "xlstm_io.remote.file_system", lambda url: (calls.append(url), file_system(url))[1]
    )
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert path.key == "/bucket/a" and path.key == "/bucket/a"
    assert calls == ["memory://bucket/a"]


def test_a_file_in_an_archive_has_a_file_system(tmp_path):
    memory = io.BytesIO()
    import zipfile

    with zipfile.ZipFile(memory, "w") as archive:
        archive.writestr("a.txt", "text")
    fsspec.filesystem("memory").pipe_file("/archives/x.zip", memory.getvalue())
    fs, name = file_system("zip://a.txt::memory://archives/x.zip")
    assert name == "a.txt" and fs.cat_file(name) == b"text"


def test_links_are_followed_and_a_loop_is_left_to_whoever_opens_it(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "loop").symlink_to("loop")
    assert absolute(tmp_path / "link" / ".." / "link") == tmp_path.resolve() / "folder"
    assert absolute(tmp_path / "loop" / "a").name == "a"
    with pytest.raises(OSError):
        read_file(absolute(tmp_path / "loop"), 10)
