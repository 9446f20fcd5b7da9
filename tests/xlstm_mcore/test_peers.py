"""Logits and gradients equal pip xlstm's on the same weights (tests/peers.txt; skipped without it).

The maps between names here are written by hand, beside the tables of `from-nxai`, whose imports
have the same logits. Traps they handle: norm weights are stored as w - 1 in the classic model,
sLSTM's `fgate` projection feeds the input gate and `igate` the forget gate, and its recurrent
kernel lies as [heads, gate * d_out, d_in].
"""

import pytest
import torch

from tests.xlstm_mcore.test_model import global_tensors
from xlstm_mcore.build import build_model, make_config
from xlstm_mcore.inference import single_process_groups
from xlstm_mcore.parameters.slices import named_slices

pytest.importorskip("xlstm", reason="pip xlstm is not installed; see tests/peers.txt")


@pytest.fixture(scope="module", autouse=True)
def groups():
    return single_process_groups()


def our_model(groups, section, weights):
    config = make_config(section)
    (model,) = build_model(config, groups, seed=0)
    used = set()
    with torch.no_grad():
        for _, parameter, slices in named_slices(model):
            for part in slices:
                part.local(parameter).copy_(part.of_global(weights[part.name]))
                used.add(part.name)
    assert used == set(weights)
    return model


def randomise(peer):
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
            if "igate" in name and name.endswith("bias"):
                parameter.clamp_(min=-1.0)


def compare(peer_logits, peer_grads, model, tokens, limit):
    """Same loss on both sides: a random weighting of the logits."""
    logits = model(tokens)
    scale = peer_logits.abs().max()
    assert (logits - peer_logits).abs().max() < limit * scale
    (logits * weighting(logits)).sum().backward()
    ours = global_tensors(model, lambda p: p.grad)
    for name, want in peer_grads.items():
        error = (ours[name] - want).abs().max() / want.abs().max().clamp(min=1e-6)
        assert error < 50 * limit, f"{name}: {error:.1e}"


def weighting(logits):
    return torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))


def large_names(blocks):
    names = {
        "embedding.weight": "embedding.word_embeddings.weight",
        "lm_head.weight": "output_layer.weight",
        "backbone.out_norm.weight": "decoder.final_norm.weight",
    }
    parts = {
        "norm_mlstm": "mixer_norm",
        "norm_ffn": "ffn_norm",
        **{f"mlstm_layer.{n}": f"mixer.{n}_proj" for n in "qkv"},
        "mlstm_layer.ogate_preact": "mixer.ogate",
        "mlstm_layer.igate_preact": "mixer.igate",
        "mlstm_layer.fgate_preact": "mixer.fgate",
        "mlstm_layer.multihead_norm": "mixer.head_norm",
        "mlstm_layer.out_proj": "mixer.out_proj",
        "ffn.proj_up_gate": "ffn.gate_proj",
        "ffn.proj_up": "ffn.up_proj",
        "ffn.proj_down": "ffn.down_proj",
    }
    for n in range(blocks):
        for theirs, ours in parts.items():
            for kind in ("weight", "bias"):
                names[f"backbone.blocks.{n}.{theirs}.{kind}"] = f"decoder.layers.{n}.{ours}.{kind}"
    return names


def large_peer(heads):
    from xlstm.xlstm_large.model import xLSTMLarge, xLSTMLargeConfig

    torch.manual_seed(0)
    peer = xLSTMLarge(
        xLSTMLargeConfig(
            embedding_dim=128,
            num_heads=heads,
            num_blocks=2,
            vocab_size=96,
            return_last_states=True,
            mode="train",
            chunkwise_kernel="chunkwise--native_autograd",
            sequence_kernel="native_sequence__native",
            step_kernel="native",
            chunk_size=16,
            autocast_kernel_dtype="float32",
        )
    )
    randomise(peer)
    return peer


@pytest.mark.parametrize(("heads", "length"), [(2, 16), (4, 64)])
def test_7b_style_equals_xlstm_large(groups, heads, length):
    peer = large_peer(heads)
    tokens = torch.randint(0, 96, (3, length))
    logits = peer(tokens)
    logits = logits[0] if isinstance(logits, tuple) else logits
    (logits * weighting(logits)).sum().backward()
    names = large_names(2)
    weights = {names[n]: p.detach() for n, p in peer.named_parameters()}
    grads = {names[n]: p.grad for n, p in peer.named_parameters()}
    section = {"pattern": "MM", "hidden_size": 128, "num_heads": heads, "vocab_size": 96}
    model = our_model(groups, section, weights)
    compare(logits.detach(), grads, model, tokens, 1e-5)


def classic_tensors(peer, letters, of, shift):
    """What `of` takes from the classic peer's parameters, under our names and layouts.

    shift: added to norm weights, which the peer stores as w - 1 (0 for their gradients).
    """
    get = {name: of(p) for name, p in peer.named_parameters()}
    out = {
        "embedding.word_embeddings.weight": get["token_embedding.weight"],
        "output_layer.weight": get["lm_head.weight"],
        "decoder.final_norm.weight": get["xlstm_block_stack.post_blocks_norm.weight"] + shift,
    }
    for n, letter in enumerate(letters):
        theirs, ours = f"xlstm_block_stack.blocks.{n}.", f"decoder.layers.{n}."
        cell = f"{theirs}xlstm."
        out[f"{ours}mixer_norm.weight"] = get[f"{theirs}xlstm_norm.weight"] + shift
        out[f"{ours}mixer.conv.weight"] = get[f"{cell}conv1d.conv.weight"].squeeze(1)
        out[f"{ours}mixer.conv.bias"] = get[f"{cell}conv1d.conv.bias"]
        if letter == "m":
            up, z = get[f"{cell}proj_up.weight"].chunk(2)
            out[f"{ours}mixer.up_proj.weight"], out[f"{ours}mixer.z_proj.weight"] = up, z
            for p in "qkv":
                out[f"{ours}mixer.{p}_proj.weight"] = get[f"{cell}{p}_proj.weight"]
            for g in ("igate", "fgate"):
                for kind in ("weight", "bias"):
                    out[f"{ours}mixer.{g}.{kind}"] = get[f"{cell}mlstm_cell.{g}.{kind}"]
            out[f"{ours}mixer.head_norm.weight"] = get[f"{cell}mlstm_cell.outnorm.weight"] + shift
            out[f"{ours}mixer.learnable_skip"] = get[f"{cell}learnable_skip"]
            out[f"{ours}mixer.out_proj.weight"] = get[f"{cell}proj_down.weight"]
        else:
            swapped = {"igate": "fgate", "fgate": "igate", "zgate": "zgate", "ogate": "ogate"}
            for mine, other in swapped.items():
                out[f"{ours}mixer.{mine}.weight"] = get[f"{cell}{other}.weight"]
            kernel = get[f"{cell}slstm_cell._recurrent_kernel_"]  # [heads, 4 * d_out, d_in]
            heads, _, d = kernel.shape
            out[f"{ours}mixer.recurrent_weight"] = kernel.view(heads, 4, d, d).permute(1, 0, 3, 2)
            bias = get[f"{cell}slstm_cell._bias_"]
            out[f"{ours}mixer.bias"] = bias.view(4, heads, d)
            out[f"{ours}mixer.head_norm.weight"] = get[f"{cell}group_norm.weight"] + shift
            out[f"{ours}ffn_norm.weight"] = get[f"{theirs}ffn_norm.weight"] + shift
            gate, up = get[f"{theirs}ffn.proj_up.weight"].chunk(2)
            out[f"{ours}ffn.gate_proj.weight"], out[f"{ours}ffn.up_proj.weight"] = gate, up
            out[f"{ours}ffn.down_proj.weight"] = get[f"{theirs}ffn.proj_down.weight"]
    return out


def classic_peer(letters, heads, vocab_size=96):
    from xlstm.blocks.mlstm.block import mLSTMBlockConfig
    from xlstm.blocks.mlstm.layer import mLSTMLayerConfig
    from xlstm.blocks.slstm.block import sLSTMBlockConfig
    from xlstm.blocks.slstm.layer import sLSTMLayerConfig
    from xlstm.components.feedforward import FeedForwardConfig
    from xlstm.xlstm_lm_model import xLSTMLMModel, xLSTMLMModelConfig

    torch.manual_seed(0)
    peer = xLSTMLMModel(
        xLSTMLMModelConfig(
            vocab_size=vocab_size,
            embedding_dim=64,
            context_length=64,
            num_blocks=len(letters),
            slstm_at=[n for n, letter in enumerate(letters) if letter == "s"],
            mlstm_block=mLSTMBlockConfig(
                mlstm=mLSTMLayerConfig(conv1d_kernel_size=4, qkv_proj_blocksize=4, num_heads=heads)
            ),
            slstm_block=sLSTMBlockConfig(
                slstm=sLSTMLayerConfig(backend="vanilla", num_heads=heads, conv1d_kernel_size=4),
                feedforward=FeedForwardConfig(proj_factor=1.3, act_fn="gelu"),
            ),
        )
    )
    peer.reset_parameters()
    randomise(peer)
    return peer


@pytest.mark.parametrize(
    ("letters", "heads", "length"), [("mm", 4, 33), ("ss", 4, 17), ("mmsm", 2, 48)]
)
def test_classic_equals_xlstm_lm_model(groups, letters, heads, length):
    peer = classic_peer(letters, heads)
    tokens = torch.randint(0, 96, (3, length))
    logits = peer(tokens)
    (logits * weighting(logits)).sum().backward()
    section = {
        **{"pattern": letters, "hidden_size": 64, "num_heads": heads, "vocab_size": 96},
        **{"norm": "layernorm", "norm_eps": 1e-5, "logit_soft_cap": None},
    }
    model = our_model(groups, section, classic_tensors(peer, letters, lambda p: p.data, 1.0))
    grads = classic_tensors(peer, letters, lambda p: p.grad, 0.0)
    compare(logits.detach(), grads, model, tokens, 1e-5)


def imported(state_dict, folder):
    """The checkpoint of `from-nxai` of a pickled state dict."""
    from xlstm_mcore.convert import cli

    folder.mkdir()
    torch.save(state_dict, folder / "model.pt")
    assert cli.main(["from-nxai", str(folder / "model.pt"), str(folder / "run")]) == 0
    return folder / "run"


def imported_logits(state_dict, folder, tokens):
    """Logits of our model after `from-nxai` of a pickled state dict."""
    from xlstm_mcore.inference import model_logits, open_model

    return model_logits(open_model(imported(state_dict, folder)), tokens)


@pytest.mark.parametrize("fused", [False, True])
def test_an_imported_xlstm_large_has_its_logits(groups, tmp_path, fused):
    from xlstm.xlstm_large.utils import convert_single_weights_to_fused_weights

    peer = large_peer(heads=2)
    tokens = torch.randint(0, 96, (3, 32))
    logits = peer(tokens)
    logits = logits[0] if isinstance(logits, tuple) else logits
    state = peer.state_dict()
    if fused:
        state = convert_single_weights_to_fused_weights(dict(state))
        assert any("qkv_opreact" in name for name in state)
    found = imported_logits(state, tmp_path / "x", tokens)
    assert (found - logits).abs().max() < 1e-5 * logits.abs().max()


@pytest.mark.parametrize("backend", ["vanilla", "compiled"])
def test_an_imported_classic_model_has_its_logits(groups, tmp_path, backend):
    peer = classic_peer("msms", heads=4)
    tokens = torch.randint(0, 96, (3, 40))
    logits = peer(tokens)
    state = dict(peer.state_dict())
    if backend == "compiled":  # its own conversion between the orders of the two backends
        from xlstm.blocks.slstm.cell import sLSTMCell_cuda

        for n in (1, 3):
            cell = peer.xlstm_block_stack.blocks[n].xlstm.slstm_cell
            other = sLSTMCell_cuda(cell.config, skip_backend_init=True)
            prefix = f"xlstm_block_stack.blocks.{n}.xlstm.slstm_cell."
            state[f"{prefix}_recurrent_kernel_"] = other._recurrent_kernel_ext2int(
                cell._recurrent_kernel_int2ext(cell._recurrent_kernel_.data)
            ).contiguous()
            state[f"{prefix}_bias_"] = other._bias_ext2int(
                cell._bias_int2ext(cell._bias_.data)
            ).contiguous()
    found = imported_logits(state, tmp_path / "x", tokens)
    assert (found - logits).abs().max() < 1e-5 * logits.abs().max()


def test_the_export_of_a_classic_model_has_its_logits(groups, tmp_path, monkeypatch):
    """Of pip xlstm's classic model, which Hugging Face has no class for: through ours and out."""
    from transformers import AutoModelForCausalLM

    import xlstm_mcore.hf  # noqa: F401  (registers the class)
    from tests.xlstm_mcore.convert.small import train_tokenizer
    from xlstm_mcore.convert import cli
    from xlstm_mcore.convert.tokenizer import corpus

    monkeypatch.setattr(corpus, "TEXTS", 100)
    peer = classic_peer("msm", heads=4, vocab_size=460)
    tokens = torch.randint(0, 460, (2, 40))
    with torch.no_grad():
        logits = peer(tokens)
    run, hf = imported(peer.state_dict(), tmp_path / "x"), tmp_path / "hf"
    spm = train_tokenizer(tmp_path / "tokenizer.model")
    words = ["to-hf", str(run), str(hf), "--tokenizer", str(spm), "--keep-padding"]
    assert cli.main(words) == 0
    exported = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    assert exported.config.model_type == "xlstm_blocks"
    with torch.no_grad():
        found = exported(tokens).logits
    assert (found - logits).abs().max() < 1e-5 * logits.abs().max()


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """An export that `to-hf` compared while pip xlstm is installed, and logits by our model."""
    from tests.xlstm_mcore.convert.small import REAL, make_weights, save, train_tokenizer
    from xlstm_mcore.convert import cli
    from xlstm_mcore.convert.tokenizer import corpus
    from xlstm_mcore.inference import model_logits, open_model

    root = tmp_path_factory.mktemp("export")
    checkpoint = save(root, make_weights(), train_tokenizer(root / "tokenizer.model"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "TEXTS", 100)
        assert cli.main(["to-hf", str(root), str(root / "hf")]) == 0
    tokens = torch.randint(REAL, (2, 64), generator=torch.Generator().manual_seed(0))
    return root / "hf", tokens, model_logits(open_model(checkpoint), tokens)[..., :REAL]


def close(found, wanted):
    """The limit of `verify`: 1e-4 at a largest logit of 5."""
    return (found - wanted).abs().max() < 1e-4 * wanted.abs().max() / 5


def test_transformers_with_pip_xlstm_installed_has_the_logits_of_an_export(groups, export):
    from transformers import AutoModelForCausalLM
    from transformers.models.xlstm import modeling_xlstm

    assert modeling_xlstm.is_xlstm_available(), "it would not compute with pip xlstm"
    folder, tokens, wanted = export
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        assert close(model(tokens, use_cache=False).logits, wanted)


def test_pip_xlstm_has_the_logits_of_an_export(groups, export):
    """Its class takes the weights as they are, but for one name."""
    import json

    from safetensors.torch import load_file
    from xlstm.xlstm_large.model import xLSTMLarge, xLSTMLargeConfig

    folder, tokens, wanted = export
    config = json.loads((folder / "config.json").read_text())
    peer = xLSTMLarge(
        xLSTMLargeConfig(
            embedding_dim=config["hidden_size"],
            num_heads=config["num_heads"],
            num_blocks=config["num_hidden_layers"],
            vocab_size=config["vocab_size"],
            norm_eps=config["norm_eps"],
            ffn_proj_factor=config["ffn_proj_factor"],
            return_last_states=True,
            mode="train",
            chunkwise_kernel="chunkwise--native_autograd",
            sequence_kernel="native_sequence__native",
            step_kernel="native",
            chunk_size=16,
            autocast_kernel_dtype="float32",
        )
    )
    weights = load_file(folder / "model.safetensors")
    weights["embedding.weight"] = weights.pop("backbone.embeddings.weight")
    peer.load_state_dict(weights)
    with torch.no_grad():
        found = peer(tokens)
    assert close(found[0] if isinstance(found, tuple) else found, wanted)
