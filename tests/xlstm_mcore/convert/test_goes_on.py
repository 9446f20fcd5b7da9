"""An export appears whole: what is killed, what is replaced, and what lies behind a URL."""

import os
import shutil

import pytest

from tests import fake_object_store
from tests.xlstm_mcore.convert.small import refused
from xlstm_mcore.convert import cli
from xlstm_mcore.convert.export import to_hf
from xlstm_mcore.convert.export import weights as weights_module
from xlstm_mcore.convert.export.folder import building

pytestmark = pytest.mark.usefixtures("few_texts")


@pytest.mark.parametrize("finished", [0, 1, 4])
def test_a_killed_conversion_goes_on(exported, tmp_path, monkeypatch, finished):
    """Finished files are kept, a cut one and a damaged one are written again."""
    _, checkpoint, _ = exported
    whole = to_hf.export(checkpoint, tmp_path / "whole", shard_bytes=400_000)
    write, written = weights_module.write_safetensors, []

    def dies(path, *arguments):
        result = write(path, *arguments)
        if len(written) == finished:
            os.truncate(path, 1000)
            raise KeyboardInterrupt
        written.append(path)
        return result

    monkeypatch.setattr(weights_module, "write_safetensors", dies)
    with pytest.raises(KeyboardInterrupt):
        to_hf.export(checkpoint, tmp_path / "hf", shard_bytes=400_000)
    assert not (tmp_path / "hf").exists()
    kept = len(written)
    if finished == 4:
        written[2].write_bytes(written[2].read_bytes()[:-1] + b"x")
        kept -= 1
    written.clear()
    finished = -1
    to_hf.export(checkpoint, tmp_path / "hf", shard_bytes=400_000)
    assert len(written) == len(whole.plan.files) - kept
    folders = (tmp_path / "whole", tmp_path / "hf")
    first, second = ({p.name: p.read_bytes() for p in f.iterdir()} for f in folders)
    assert first == second
    assert not list(tmp_path.glob(".*"))


def test_another_conversion_of_the_same_folder_is_an_error(exported, tmp_path, capsys):
    _, checkpoint, _ = exported
    with building(tmp_path / "hf"):
        message = refused(capsys, "to-hf", checkpoint, tmp_path / "hf")
        assert "another conversion is writing" in message


def test_only_an_earlier_export_is_replaced(exported, tmp_path, capsys):
    _, checkpoint, _ = exported
    out = tmp_path / "hf"
    out.mkdir()
    assert cli.main(["to-hf", str(checkpoint), str(out)]) == 0
    (out / "parity.json").write_text("{}")
    assert cli.main(["to-hf", str(checkpoint), str(out), "--no-verify"]) == 0
    assert not (out / "parity.json").exists(), "a report about older weights is not kept"
    capsys.readouterr()
    (out / "xlstm_export.json").unlink()
    before = sorted(out.iterdir())
    assert "is not an earlier export" in refused(capsys, "to-hf", checkpoint, out)
    assert sorted(out.iterdir()) == before
    file = tmp_path / "file"
    file.write_text("mine")
    assert "is not an earlier export" in refused(capsys, "to-hf", checkpoint, file)
    assert file.read_text() == "mine"


def test_an_export_to_a_url_is_the_same_folder(exported, tmp_path):
    _, checkpoint, folder = exported
    fake_object_store.register()
    url = f"objects://{tmp_path}/bucket/hf"
    shutil.copytree(checkpoint, tmp_path / "bucket/run" / checkpoint.name)
    # The second replaces the first.
    for source in (checkpoint, f"objects://{tmp_path}/bucket/run"):
        assert cli.main(["to-hf", str(source), url]) == 0
    found = {p.name: p.read_bytes() for p in (tmp_path / "bucket/hf").iterdir()}
    local = {p.name: p.read_bytes() for p in folder.iterdir() if "parity" not in p.name}
    assert found == local
