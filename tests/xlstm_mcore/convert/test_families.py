"""Exports of every family: compared by `verify`, and loaded in a process without this project."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from pretrain.checkpoint import TensorSlice, save_checkpoint
from tests.xlstm_mcore.convert.hf_models import ARCHITECTURES, our_model
from tests.xlstm_mcore.test_model import global_tensors
from xlstm_io.checkpoint.manifest import read_manifest, resolve
from xlstm_mcore.convert import cli
from xlstm_mcore.convert.errors import ConvertError
from xlstm_mcore.convert.families import choose
from xlstm_mcore.inference import model_logits
from xlstm_mcore.settings import ModelConfig

VOCAB = 470  # more than the tokenizer's: the rest is padding


pytestmark = pytest.mark.usefixtures("few_texts")


def exported(root, spm, name, *words, **changes):
    """(our model, the folder that `to-hf` wrote after it compared the two)."""
    ours = our_model(name, vocab_size=VOCAB, **changes)
    tensors = global_tensors(ours)
    slices = [TensorSlice(n, tuple(t.shape), (0,) * t.ndim, t.float()) for n, t in tensors.items()]
    digest = hashlib.sha256(spm.read_bytes()).hexdigest()
    state = {"tokens": 1, "tokenizer": {"path": str(spm), "sha256": digest}}
    config = {"model": ours.config.model.model_dump(), "data": {"seq_len": 96}}
    checkpoint = save_checkpoint(root, slices, state, config, step=1)
    assert cli.main(["to-hf", str(checkpoint), str(root / "hf"), *words]) == 0
    return ours, root / "hf"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_export_is_compared_and_equal(tmp_path, spm, name):
    ours, folder = exported(tmp_path, spm, name)
    report = json.loads((folder / "parity.json").read_text())
    assert all(check["passed"] for check in report["checks"]), report
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == ("llama" if name == "llama" else "xlstm_blocks")
    if name == "llama":
        assert config["max_position_embeddings"] == 96 and not list(folder.glob("*.py"))
    tokens = torch.randint(config["vocab_size"], (2, 33), generator=torch.Generator())
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    wanted = model_logits(ours, tokens)[..., : config["vocab_size"]]
    with torch.no_grad():
        difference = (model(tokens).logits - wanted).abs().max()
    assert difference < 2e-5 * wanted.abs().max()


def test_the_folder_loads_trains_and_saves_without_this_project(tmp_path, spm):
    ours, folder = exported(tmp_path, spm, "hybrid")
    code = """if True:
        import sys

        class NotInstalled:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("xlstm_mcore", "xlstm_kernels", "xlstm_io", "megatron"):
                    raise ModuleNotFoundError(name)

        sys.meta_path.insert(0, NotInstalled())
        import os
        import pathlib
        import re

        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        folder, again, out = sys.argv[1:]
        try:
            AutoModelForCausalLM.from_pretrained(folder)
        except ValueError as error:
            assert "trust_remote_code" in str(error), error
        else:
            raise AssertionError("code of the folder ran without being trusted")
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        tokens = torch.arange(3, 40)[None]
        logits = model.eval()(tokens).logits
        model.train()(tokens, labels=tokens).loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        model.save_pretrained(again)
        model = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
        assert torch.equal(model.eval()(tokens).logits, logits)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
        bias = fresh.model.layers[0].mixer.fgate.bias
        assert bias[0] == 3 and bias[-1] == 6, bias
        torch.save(logits.detach(), out)
        os.chdir(folder)
        card = pathlib.Path("README.md").read_text()
        (program,) = re.findall("```python\\n(.*?)```", card, re.S)
        exec(program)
    """
    words = [sys.executable, "-c", code, folder, tmp_path / "again", tmp_path / "logits.pt"]
    env = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        list(map(str, words)),
        check=True,
        cwd=tmp_path,
        env=env,
        timeout=200,
        stdout=subprocess.PIPE,
    )
    assert b"Once" in done.stdout, "the card's program writes what follows this word"
    theirs = torch.load(tmp_path / "logits.pt", weights_only=True)
    wanted = model_logits(ours, torch.arange(3, 40)[None])[..., : theirs.shape[-1]]
    assert (theirs - wanted).abs().max() < 2e-5 * wanted.abs().max()
    assert {p.name for p in (tmp_path / "again").glob("*.py")} == {
        "configuration_xlstm_blocks.py",
        "modeling_xlstm_blocks.py",
    }


@pytest.mark.parametrize("name", ["hybrid", "llama"])
def test_rows_without_a_token_that_are_kept_get_no_logit(tmp_path, spm, name):
    """Loss and samples are those of the run, which `llama` could not say."""
    ours, folder = exported(tmp_path, spm, name, "--keep-padding", vocab_tokens=450)
    report = json.loads((folder / "parity.json").read_text())
    assert all(check["passed"] for check in report["checks"]), report
    config = json.loads((folder / "config.json").read_text())
    keys = [config[key] for key in ("model_type", "vocab_size", "vocab_tokens")]
    assert keys == ["xlstm_blocks", VOCAB, 450]
    assert "last 20 rows of the vocabulary have no token" in (folder / "README.md").read_text()
    tokens = torch.randint(450, (2, 33), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(folder)
    result = model(tokens, labels=tokens)
    with torch.no_grad():
        loss = ours(tokens[:, :-1], None, tokens[:, 1:]).mean()
    assert (result.loss - loss).abs() < 1e-5 * loss
    assert result.logits[..., :450].isfinite().all() and result.logits[..., 450:].isneginf().all()
    result.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        model.get_output_embeddings().weight[450:] = 50 * model.get_output_embeddings().weight[:20]
    sampled = model.generate(tokens, do_sample=True, top_k=0, temperature=3.0, max_new_tokens=20)
    assert sampled.max() < 450
    assert cli.main(["from-hf", str(folder), str(tmp_path / "back")]) == 0
    assert read_manifest(resolve(tmp_path / "back")).config["model"]["vocab_tokens"] == 450


def test_mamba2_has_no_export_and_the_message_says_why():
    model = ModelConfig(hidden_size=16, num_heads=2, vocab_size=8, pattern="md")
    for name in (None, "xlstm_blocks"):
        with pytest.raises(ConvertError, match="no d block"):
            choose(model, name)
