"""A name that a file says leads nowhere but into its own folder, whoever reads or writes it."""

import gc
import io
import json
import os
import zipfile

import numpy as np
import pytest
import torch
import xxhash

from benchmarks.loader.synthetic_shards import write_shards
from data_prep.tools.merge import merge
from data_prep.tools.repack import repack
from pretrain.checkpoint import TensorSlice, load_checkpoint, save_checkpoint
from pretrain.data import TokenDataset
from pretrain.data.cache import CacheSettings
from tests.xlstm_io.conftest import change_manifest
from xlstm_io.checkpoint.manifest import manifest_checksum, read_manifest
from xlstm_io.errors import CheckpointError, ShardFormatError, TokenizerFileError, UserError
from xlstm_io.foreign.untrusted import LIMITS, check_name, check_names, inside
from xlstm_io.shards import manifest as manifest_module
from xlstm_io.shards.index import CorruptShardError
from xlstm_io.shards.manifest import MANIFEST_NAME, load_manifest
from xlstm_io.shards.shard import ShardReader
from xlstm_io.storage import RemotePath
from xlstm_io.tokenizer.open import open_tokenizer

OUTSIDE = "names a file outside its folder"
HOSTILE = {
    "parent": "../victim",
    "parent below": "a/../../victim",
    "back inside": "a/../a/b",
    "absolute": "/etc/hostname",
    "empty": "",
    "dot": ".",
    "two dots": "..",
    "empty part": "a//b",
    "a folder": "a/",
    "NUL": "a\0b",
    "no text for a file system": "a\ud800b",
}
hostile = pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)


@hostile
def test_a_hostile_name_is_an_error_that_names_value_rule_and_file(tmp_path, name):
    for call in (check_name, lambda name, **about: inside(tmp_path, name, **about)):
        with pytest.raises(ShardFormatError, match=OUTSIDE) as caught:
            call(name, named_in="in/manifest.json", error=ShardFormatError)
        assert "in/manifest.json" in str(caught.value) and repr(name) in str(caught.value)


@hostile
@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_hostile_name_among_many_is_the_one_that_is_named(name, place):
    names = ["web/a.tar", "ü/.b", "..c/d.."]
    check_names(names, named_in="in/manifest.json")
    names.insert(place, name)
    with pytest.raises(ShardFormatError, match=OUTSIDE) as caught:
        check_names(names, named_in="in/manifest.json", error=ShardFormatError)
    assert f": {name!r} (" in str(caught.value)


@pytest.mark.parametrize("name", [None, 3, ["a"], {}, True, b"a"])
def test_what_is_not_text_is_no_name(tmp_path, name):
    with pytest.raises(UserError, match=OUTSIDE):
        inside(tmp_path, name, named_in="x.json")


def test_a_very_long_name_does_not_fill_the_screen(tmp_path):
    with pytest.raises(UserError, match=OUTSIDE) as caught:
        inside(tmp_path, "../" * 100_000, named_in="x.json")
    assert len(str(caught.value)) < 500


def test_names_inside_are_places_whether_or_not_they_exist(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "here").symlink_to(tmp_path / "a")
    for name in ("a", "a/b.tar", "new/b.tar", "here/b.tar", "..a", "a..b", "~", "-", "ä b"):
        assert inside(tmp_path, name, named_in="x.json") == tmp_path / name


def test_a_root_that_is_a_link_itself_is_fine(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "root").symlink_to("real")
    assert inside(tmp_path / "root", "a", named_in="x.json") == tmp_path / "root" / "a"


@pytest.mark.parametrize("target", ["..", "../other", "/etc", "/etc/hostname"])
@pytest.mark.parametrize("name", ["link", "link/b", "a/link/b"])
def test_a_link_that_leads_out_is_an_error(tmp_path, target, name):
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "link").symlink_to(target)
    (root / "a" / "link").symlink_to("../link")
    with pytest.raises(UserError, match=rf"{OUTSIDE}.*a link leads to"):
        inside(root, name, named_in="x.json")


def test_a_sibling_with_the_same_beginning_is_outside(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root2").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "root2")
    with pytest.raises(UserError, match=OUTSIDE):
        inside(tmp_path / "root", "link", named_in="x.json")


def test_links_in_a_circle_end(tmp_path):
    (tmp_path / "x").symlink_to("y")
    (tmp_path / "y").symlink_to("x")
    inside(tmp_path, "x", named_in="x.json")  # it has no target; opening it is an OSError


def test_a_url_gets_no_second_file_system(tmp_path):
    root = RemotePath("s3://bucket/run")
    assert str(inside(root, "a/b", named_in="x")) == "s3://bucket/run/a/b"
    with pytest.raises(UserError, match=OUTSIDE):
        inside(root, "a::file:///etc/hostname", named_in="x")


# --- every reader of names -----------------------------------------------------------------------


def first_shard(fields):
    return fields["sources"][0]["splits"]["train"]["shards"][0]


PLACES = {
    "tar": lambda fields, name: first_shard(fields).__setitem__("path", name),
    "index": lambda fields, name: first_shard(fields).__setitem__("index", name),
    "tokenizer": lambda fields, name: fields["tokenizer"].__setitem__("path", name),
}
places = pytest.mark.parametrize("place", PLACES)


def tree(folder):
    """Every path below a folder with its bytes."""
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@hostile
@places
def test_no_command_follows_a_hostile_name_in_a_manifest_of_shards(shards, tmp_path, name, place):
    (shards.parent / "victim").write_bytes(b"untouched")
    change_manifest(shards, lambda fields: PLACES[place](fields, name))
    before = tree(tmp_path)
    (tmp_path / "out").mkdir()
    for act in (
        lambda: load_manifest(shards),
        lambda: TokenDataset(shards, seq_len=16),
        lambda: TokenDataset(
            f"file://{shards}", seq_len=16, cache=CacheSettings(tmp_path / "out" / "cache", 10**9)
        ),
        lambda: repack(shards, 8, tmp_path / "out" / "repacked", workers=1),
        lambda: merge(tmp_path / "out" / "merged", [shards, shards], allow_duplicates=True),
    ):
        with pytest.raises(UserError, match=OUTSIDE):
            act()
    after = {
        path: data
        for path, data in tree(tmp_path).items()
        if tmp_path / "out" not in (path, *path.parents)
    }
    assert after == before


@pytest.mark.parametrize("place", ["tar", "index"])
def test_a_link_out_of_a_folder_of_shards_is_not_read(shards, tmp_path, place):
    entry = load_manifest(shards).shards("train")[0]
    file = shards / (entry.path if place == "tar" else entry.index)
    file.rename(tmp_path / "real")
    file.symlink_to(tmp_path / "real")
    manifest = load_manifest(shards)
    with pytest.raises(ShardFormatError, match=OUTSIDE):
        ShardReader(manifest, entry)
    with pytest.raises(UserError, match=OUTSIDE):
        repack(shards, 8, tmp_path / "repacked", workers=1)
    assert (tmp_path / "real").exists()


def test_a_link_in_the_output_is_not_written_through(shards, tmp_path):
    """`repack` and `merge` write below OUT only, even where a folder there is a link."""
    out, victim, other = (tmp_path / name for name in ("out", "victim", "other"))
    for folder in (out, victim, other):
        folder.mkdir()
    write_shards(other, {"b": [3]}, seq_len=16, block_rows=4, valid_rows=3)
    (out / "b").symlink_to(victim)
    with pytest.raises(ShardFormatError, match=OUTSIDE):
        merge(out, [shards, other], allow_duplicates=True)
    assert not list(victim.iterdir())


@pytest.mark.parametrize("value", ["0" * 15, "0" * 15 + "g", "0" * 16 + "\n", "A" * 16])
def test_a_hash_that_is_none_is_one_message(shards, value):
    entry = ["sources", 0, "splits", "train", "shards", 1]

    def change(fields):
        for key in entry:
            fields = fields[key]
        fields["xxh3"] = value

    change_manifest(shards, change)
    with pytest.raises(
        ShardFormatError, match=r"shards\[1\]\.xxh3=.* must be 16 hexadecimal digits"
    ):
        load_manifest(shards)


def test_a_manifest_is_read_without_a_search_for_cycles(shards, monkeypatch):
    """The search takes longer than the reading where there are many shards."""
    meanwhile, inner = [], manifest_module.checked

    def recorded(*words, **options):
        meanwhile.append(gc.isenabled())
        return inner(*words, **options)

    monkeypatch.setattr(manifest_module, "checked", recorded)
    load_manifest(shards)
    change_manifest(shards, lambda fields: fields.update(seq_len=-1))
    with pytest.raises(ShardFormatError):
        load_manifest(shards)
    assert meanwhile == [False, False] and gc.isenabled()


def test_two_shards_of_one_file_are_an_error(shards):
    other = load_manifest(shards).shards("train")[1]
    change_manifest(shards, lambda fields: PLACES["tar"](fields, other.path))
    with pytest.raises(ShardFormatError, match="names a file for two shards"):
        load_manifest(shards)


@hostile
def test_a_hostile_name_in_a_checkpoint_is_not_followed(tmp_path, name):
    part = TensorSlice("w", (4,), (0,), torch.zeros(4))
    path = save_checkpoint(tmp_path, [part], {}, {}, step=1)
    body = json.loads((path / "manifest.json").read_text())
    body["files"][name] = {"size": 1, "xxh3": "0"}
    body["checksum"] = manifest_checksum(body)
    (path / "manifest.json").write_text(json.dumps(body))
    for read in (read_manifest, lambda path: load_checkpoint(path, [part])):
        with pytest.raises(CheckpointError, match=OUTSIDE):
            read(path)


# --- sizes ---------------------------------------------------------------------------------------


def test_files_over_their_limit_are_not_read(shards):
    entry = load_manifest(shards).shards("train")[0]
    manifest = load_manifest(shards)
    os.truncate(shards / entry.index, LIMITS.shard_index + 1)  # sparse
    with pytest.raises(CorruptShardError, match="are not read"):
        ShardReader(manifest, entry)
    os.truncate(shards / MANIFEST_NAME, LIMITS.shard_manifest + 1)
    with pytest.raises(ShardFormatError, match="are not read"):
        load_manifest(shards)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_over_the_limit_is_not_read(tmp_path, name):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, LIMITS.tokenizer + 1)
    with pytest.raises(TokenizerFileError, match="are not read"):
        open_tokenizer(tmp_path)


def test_a_manifest_of_deep_nesting_is_damaged(shards):
    (shards / MANIFEST_NAME).write_text("[" * 100_000)
    with pytest.raises(ShardFormatError, match="is not valid JSON"):
        load_manifest(shards)


def test_a_pipe_in_place_of_a_file_does_not_wait_for_ever(shards):
    (shards / MANIFEST_NAME).unlink()
    os.mkfifo(shards / MANIFEST_NAME)
    with pytest.raises(ShardFormatError, match="not a plain file"):
        load_manifest(shards)


def index_bytes(kind):
    """An index of a stranger: its hash fits, its contents do not."""
    buffer = io.BytesIO()
    if kind == "bomb":  # a MB of zeros in a KB
        np.savez_compressed(buffer, off=np.zeros(1 << 17, np.uint64))
    elif kind == "pickle":
        np.savez(buffer, off=np.array([{}], object))
    elif kind == "other arrays":
        np.savez(buffer, other=np.zeros(1))
    elif kind == "other files":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("off.npy", b"not numpy")
    else:
        buffer.write(b"not a zip file")
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["bomb", "pickle", "other arrays", "other files", "no archive"])
def test_an_index_that_is_none_is_damage_even_with_the_right_hash(shards, kind):
    raw = index_bytes(kind)
    entry = load_manifest(shards).shards("train")[0]
    (shards / entry.index).write_bytes(raw)
    digest = xxhash.xxh3_64_hexdigest(raw)
    change_manifest(shards, lambda fields: first_shard(fields).__setitem__("index_xxh3", digest))
    manifest = load_manifest(shards)
    with pytest.raises(CorruptShardError, match="a readable index"):
        ShardReader(manifest, manifest.shards("train")[0])
