"""Import of Hugging Face folders and of pip xlstm's state dicts: bit by bit, and by logits."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, xLSTMConfig, xLSTMForCausalLM

from pretrain.checkpoint import TensorSlice, save_checkpoint
from pretrain.commands.after_run.show import show
from tests.xlstm_mcore.convert.small import make_weights, save, train_tokenizer
from tests.xlstm_mcore.test_generation_state import make_model
from xlstm_io.checkpoint.manifest import read_manifest, resolve
from xlstm_io.checkpoint.reader import CheckpointReader
from xlstm_io.checkpoint.tokenizer import tokenizer_of
from xlstm_io.tokenizer import read_tokenizer_files
from xlstm_mcore.convert import cli
from xlstm_mcore.convert.families import FAMILIES, custom, llama, native_xlstm, nxai_classic
from xlstm_mcore.convert.families import nxai_large as large
from xlstm_mcore.convert.imports.config import width_keys
from xlstm_mcore.convert.tables import rows
from xlstm_mcore.inference import model_logits, open_model
from xlstm_mcore.parameters.slices import named_slices
from xlstm_mcore.settings import ModelConfig
from xlstm_mcore.sizes.dimensions import dimensions

pytestmark = pytest.mark.usefixtures("few_texts")


CLASSIC = {"norm": "layernorm", "norm_eps": 1e-5, "logit_soft_cap": None}
LLAMA = {"logit_soft_cap": None, "attention_heads": 4, "attention_kv_heads": 2}


def model_of(pattern, hidden=64, heads=4, **keys):
    size = {"hidden_size": hidden, "num_heads": heads, "vocab_size": 90}
    return ModelConfig.model_validate({"pattern": pattern, **size, **keys})


def random_tensors(table, model):
    """A model's tensors under both names; what is theirs is made by the table."""
    rng = torch.Generator().manual_seed(0)
    ours, theirs = {}, {}
    for row in rows(table, model):
        # Near 1: then w - 1 and back loses no bit, as for trained norms.
        parts = [1 + 0.2 * torch.rand(shape, generator=rng) for shape in row.shapes]
        ours |= dict(zip(row.ours, parts, strict=True))
        theirs[row.theirs] = row.transform.to_theirs(parts).contiguous()
        assert theirs[row.theirs].shape == row.shape, row.theirs
    return ours, theirs


def classic_table(*kernel):
    return nxai_classic.table({"x._recurrent_kernel_": kernel})


VANILLA, COMPILED = classic_table(4, 64, 16), classic_table(4, 16, 64)
CASES = {
    "native": (native_xlstm.TABLE, model_of("MM")),
    "native, odd widths": (native_xlstm.TABLE, model_of("MM", 96, ffn_dim_factor=2.667)),
    "native, no multiple": (
        native_xlstm.TABLE,
        model_of(
            "M", 100, qk_dim_factor=0.52, v_dim_factor=0.76, ffn_dim_factor=1.03, round_up_to=1
        ),
    ),
    "native, fused": (native_xlstm.FUSED_TABLE, model_of("MM")),
    "llama": (llama.TABLE, model_of("**", **LLAMA)),
    "llama, tied": (llama.TABLE, model_of("*", tie_embeddings=True, **LLAMA)),
    "custom": (custom.TABLE, model_of("Mms*", gate_soft_cap=None, head_norm="rmsnorm")),
    "custom, tied": (custom.TABLE, model_of("ms", tie_embeddings=True, conv_width=0)),
    "large": (large.table({}), model_of("MM")),
    "large, fused": (large.table({"x.qkv_opreact.weight": ()}), model_of("MM")),
    "classic, vanilla": (VANILLA, model_of("mms", **CLASSIC)),
    "classic, compiled": (COMPILED, model_of("smm", 48, qkv_block_size=8, **CLASSIC)),
    "classic, no convolution": (COMPILED, model_of("sm", conv_width=0, **CLASSIC)),
}


def write_case(folder, name):
    table, model = CASES[name]
    ours, theirs = random_tensors(table, model)
    folder.mkdir()
    save_file(theirs, folder / "model.safetensors")
    family = {"native": native_xlstm, "llama": llama, "custom": custom}.get(name.split(",")[0])
    if family is not None:
        (folder / "config.json").write_text(json.dumps(family.config(model) | {"vocab_size": 90}))
    return "from-nxai" if family is None else "from-hf", model, ours


def tensors_of(path):
    with CheckpointReader(path) as reader:
        return {name: reader.read(name) for name in reader.manifest.tensors}


@pytest.mark.parametrize("name", CASES)
def test_every_family_comes_back_bit_by_bit(name, tmp_path, capsys):
    command, model, ours = write_case(tmp_path / "theirs", name)
    assert cli.main([command, str(tmp_path / "theirs"), str(tmp_path / "run")]) == 0
    assert "no optimizer state" in capsys.readouterr().out
    path = resolve(tmp_path / "run")
    found = tensors_of(path)
    assert found.keys() == ours.keys()
    for tensor, value in ours.items():
        assert torch.equal(found[tensor], value), tensor
    manifest = read_manifest(path)
    imported = ModelConfig.model_validate(manifest.config["model"])
    assert dimensions(imported) == dimensions(model) or set(model.pattern) != set("Mms*")
    assert (manifest.step, imported.pattern) == (0, model.pattern)
    for key in ("num_heads", "tie_embeddings", "norm", "logit_soft_cap", "conv_width"):
        if key != "conv_width" or set(model.pattern) & set("ms"):
            assert getattr(imported, key) == getattr(model, key), key
    open_model(path)  # builds, and takes every tensor


@pytest.mark.parametrize("hidden", [96, 192, 384, 768, 1536, 4096])
@pytest.mark.parametrize("width", ["ours", "theirs"])
def test_widths_are_those_of_the_weights_and_not_of_a_factor(hidden, width):
    """ceil(2.667 d / 64) 64 and floor((2.667 d + 63) / 64) 64 differ at the first five."""
    ours = dimensions(model_of("M", hidden, 2)).ffn
    ffn = ours if width == "ours" else int((hidden * 2.667 + 63) // 64 * 64)
    keys = width_keys(hidden, ffn=ffn, qk=hidden // 2 - 3, v=hidden - 1)
    found = dimensions(model_of("M", hidden, 1, **keys))
    assert (found.ffn, found.qk, found.v) == (ffn, hidden // 2 - 3, hidden - 1)


def logits_agree(theirs, folder, run, capsys):
    theirs.save_pretrained(folder)
    assert cli.main(["from-hf", str(folder), str(run)]) == 0
    tokens = torch.randint(0, 90, (2, 33), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens, use_cache=False).logits
    found = model_logits(open_model(run), tokens)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max().clamp(min=1)
    assert expected.std() > 0.1


def moved(model):
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng))
            if "igate" in name and name.endswith("bias"):
                parameter.clamp_(min=-1.0)
    return model.eval()


def test_logits_of_llama(tmp_path, capsys):
    config = LlamaConfig(
        vocab_size=90, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, rope_theta=5000.0,
    )  # fmt: skip
    logits_agree(moved(LlamaForCausalLM(config)), tmp_path / "a", tmp_path / "run", capsys)
    tied = LlamaForCausalLM(LlamaConfig(**config.to_dict() | {"tie_word_embeddings": True}))
    logits_agree(moved(tied), tmp_path / "b", tmp_path / "tied", capsys)
    assert read_manifest(resolve(tmp_path / "tied")).config["model"]["tie_embeddings"]


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_scaling": {"type": "linear", "factor": 4.0}},  # as transformers wrote it before 4.43
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_scaling": {"factor": 4.0}},
        {"rope_scaling": ["linear"]},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "dynamic"}},
        {"rope_scaling": {"type": "default", "partial_rotary_factor": 0.5}},
        {"partial_rotary_factor": 0.5},
        {"sliding_window": 8},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"hidden_act": "gelu"},
    ],
    ids=str,
)
def test_attention_of_another_kind_is_refused(keys, tmp_path, capsys):
    command, _, _ = write_case(tmp_path / "theirs", "llama")
    file = tmp_path / "theirs/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    assert cli.main([command, str(tmp_path / "theirs"), str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {file}: ") and "can be imported exactly" in message
    assert not (tmp_path / "run").exists()


def test_a_plain_rope_under_its_older_names_is_read(tmp_path):
    command, _, _ = write_case(tmp_path / "theirs", "llama")
    file = tmp_path / "theirs/config.json"
    config = json.loads(file.read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": 500.0, "rope_scaling": {"type": "default", "factor": 1.0}}
    file.write_text(json.dumps(config))
    assert cli.main([command, str(tmp_path / "theirs"), str(tmp_path / "run")]) == 0
    assert read_manifest(resolve(tmp_path / "run")).config["model"]["rotary_base"] == 500.0


def test_a_cap_of_null_is_no_cap(tmp_path):
    command, _, _ = write_case(tmp_path / "theirs", "native")
    file = tmp_path / "theirs/config.json"
    none = {"gate_soft_cap": None, "output_logit_soft_cap": None}
    file.write_text(json.dumps(json.loads(file.read_text()) | none))
    assert cli.main([command, str(tmp_path / "theirs"), str(tmp_path / "run")]) == 0
    model = read_manifest(resolve(tmp_path / "run")).config["model"]
    assert (model["gate_soft_cap"], model["logit_soft_cap"]) == (None, None)


def test_more_tokens_than_rows_are_refused(tmp_path, capsys):
    command, _, _ = write_case(tmp_path / "theirs", "custom")
    file = tmp_path / "theirs/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_tokens": 91}))
    assert cli.main([command, str(tmp_path / "theirs"), str(tmp_path / "run")]) == 2
    assert "model.vocab_tokens=91 is more than the rows of model.vocab_size=90" in (
        capsys.readouterr().err
    )


def test_logits_of_transformers_xlstm(tmp_path, capsys):
    config = xLSTMConfig(
        vocab_size=90, hidden_size=96, num_hidden_layers=2, num_heads=2, qk_dim_factor=2 / 3,
        chunk_size=16, autocast_kernel_dtype="float32", eos_token_id=1, bos_token_id=0,
        pad_token_id=2,
    )  # fmt: skip
    logits_agree(moved(xLSTMForCausalLM(config)), tmp_path / "a", tmp_path / "run", capsys)


def test_an_export_comes_back_with_its_tokenizer(tmp_path, capsys):
    spm = train_tokenizer(tmp_path / "t.model")
    weights = make_weights()
    save(tmp_path, weights, spm)
    out, back = tmp_path / "hf", tmp_path / "back"
    assert cli.main(["to-hf", str(tmp_path), str(out)]) == 0
    words = ["from-hf", str(out), str(back), "--vocab-size", "704"]
    assert cli.main(words) == 0
    path = resolve(back)
    found = tensors_of(path)
    for name, value in weights.items():
        rows_ = len(load_file(out / "model.safetensors")["lm_head.weight"])
        real = value[:rows_] if len(value) == 700 else value
        assert torch.equal(found[name][: len(real)], real), name
        assert not found[name][len(real) :].any(), "further rows are zero"
    assert tokenizer_of(path).sha256 == tokenizer_of(resolve(tmp_path)).sha256
    again = tmp_path / "again"
    assert cli.main(["to-hf", str(back), str(again), "--no-verify"]) == 0
    assert "imported from `hf` and not trained since" in (again / "README.md").read_text()
    assert "imported    from hf as xlstm\n" in show(back) and "written on" not in show(back)
    assert cli.main(words) == 2
    assert "holds a checkpoint already" in capsys.readouterr().err


def test_a_dry_run_prints_the_table_with_what_is_missing_and_left_over(tmp_path, capsys):
    command, _, _ = write_case(tmp_path / "theirs", "native")
    assert cli.main([command, str(tmp_path / "theirs"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "backbone.blocks.1.ffn.proj_down.weight" in shown and "0 left over" in shown
    file = tmp_path / "theirs/model.safetensors"
    tensors = load_file(file)
    del tensors["backbone.blocks.1.norm_ffn.weight"]
    tensors["backbone.blocks.0.mlstm_layer.q.bias"] = torch.zeros(32)
    tensors["backbone.out_norm.weight"] = torch.zeros(63)
    save_file(tensors, file)
    assert cli.main([command, str(tmp_path / "theirs"), "--dry-run", "--json"]) == 2
    table = json.loads(capsys.readouterr().out)
    bad = {row["theirs"]: row["status"] for row in table["tensors"] if row["status"] != "ok"}
    assert bad == {
        "backbone.blocks.1.norm_ffn.weight": "missing",
        "backbone.out_norm.weight": "has shape [63]",
    }
    assert table["left_over"] == ["backbone.blocks.0.mlstm_layer.q.bias"]
    assert cli.main([command, str(tmp_path / "theirs"), str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert "norm_ffn.weight [64]: missing" in message and "q.bias: left over" in message
    assert not (tmp_path / "run").exists()


def test_keys_that_a_state_dict_does_not_say_can_be_set(tmp_path, capsys):
    command, _, _ = write_case(tmp_path / "theirs", "large")
    words = [command, str(tmp_path / "theirs/model.safetensors"), str(tmp_path / "run")]
    assert cli.main([*words, "--set", "gate_soft_cap=null", "--set", "norm_eps=1e-5"]) == 0
    model = read_manifest(resolve(tmp_path / "run")).config["model"]
    assert (model["gate_soft_cap"], model["norm_eps"]) == (None, 1e-5)
    assert cli.main([*words, "--set", "nonsense=1"]) == 2
    assert cli.main([*words, "--set", "num_heads=many"]) == 2
    err = capsys.readouterr().err
    assert "wanted KEY=VALUE" in err and "model.num_heads=many" in err


def test_half_precision_keeps_its_dtype_and_norms_gain_one_exactly(tmp_path):
    table, model = CASES["classic, vanilla"]
    _, theirs = random_tensors(table, model)
    theirs = {name: tensor.bfloat16() for name, tensor in theirs.items()}
    torch.save({"state_dict": theirs}, tmp_path / "model.pt")
    assert cli.main(["from-nxai", str(tmp_path / "model.pt"), str(tmp_path / "run")]) == 0
    found = tensors_of(resolve(tmp_path / "run"))
    norm = theirs["xlstm_block_stack.blocks.0.xlstm_norm.weight"]
    assert torch.equal(found["decoder.layers.0.mixer_norm.weight"], norm.float() + 1)
    up = theirs["xlstm_block_stack.blocks.0.xlstm.proj_up.weight"]
    assert torch.equal(found["decoder.layers.0.mixer.up_proj.weight"], up[: len(up) // 2])


def test_the_families_of_an_import_are_those_of_the_export():
    for family in FAMILIES.values():
        assert family.table({}).layers and callable(family.model_section)


def test_a_config_as_the_7b_was_published_with_is_read(tmp_path):
    """Old names of keys, kernels that transformers refuses here, and keys that nobody reads."""
    command, _, ours = write_case(tmp_path / "theirs", "native")
    file = tmp_path / "theirs/config.json"
    config = json.loads(file.read_text())
    config["embedding_dim"] = config.pop("hidden_size")
    config["num_blocks"] = config.pop("num_hidden_layers")
    config |= {
        "chunkwise_kernel": "chunkwise--triton_xl_chunk",
        "sequence_kernel": "native_sequence__triton",
        "step_kernel": "triton",
        "add_qk_norm": False,
        "add_post_norm": False,
        "force_bos_token_insert": True,
        "head_dim": 32,
        "mlstm_round_up_to_multiple_of": 64,
        "torch_dtype": "float32",
        "use_bias": False,
    }
    file.write_text(json.dumps(config))
    assert cli.main([command, str(tmp_path / "theirs"), str(tmp_path / "run")]) == 0
    found = tensors_of(resolve(tmp_path / "run"))
    assert all(torch.equal(found[name], value) for name, value in ours.items())


def test_an_export_of_our_own_class_comes_back(tmp_path):
    """Every kind of block, out and in, bit by bit over the rows that have a token."""
    model = make_model("Mms*", vocab_size=512)
    parts = [
        TensorSlice(p.name, p.global_shape, p.global_offset, p.local(parameter.detach()))
        for _, parameter, slices in named_slices(model)
        for p in slices
    ]
    files = read_tokenizer_files(train_tokenizer(tmp_path / "t.model"))
    config = {"model": model.config.model.model_dump(mode="json")}
    state = {"tokenizer": {}}
    first = save_checkpoint(tmp_path / "first", parts, state, config, step=3, files=files)
    out, back = str(tmp_path / "hf"), str(tmp_path / "back")
    assert cli.main(["to-hf", str(first), out, "--no-verify"]) == 0
    assert cli.main(["from-hf", out, back, "--vocab-size", "512"]) == 0
    before, after = tensors_of(first), tensors_of(resolve(back))
    assert before.keys() == after.keys()
    tokens = tokenizer_of(first).vocab_size
    for name, value in before.items():
        real = value[:tokens] if len(value) == 512 else value
        assert torch.equal(after[name][: len(real)], real), name
        assert not after[name][len(real) :].any()
    again = read_manifest(resolve(back)).config["model"]
    assert again["vocab_tokens"] == tokens, "rows of zeros get no logit"
    assert {k: v for k, v in again.items() if v != config["model"][k]}.keys() <= {
        "attention_heads",
        "attention_kv_heads",
        "igate_bias_init",
        "dropout",
        "vocab_tokens",
    }
