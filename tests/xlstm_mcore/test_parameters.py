"""A model's parameters: their initial values, weight decay and slices."""

from typing import get_args

import pytest
import torch

from pretrain.config.schema import ParameterKind
from xlstm_mcore.build import build_model, make_config
from xlstm_mcore.inference import single_process_groups
from xlstm_mcore.parameters.decay import KINDS, decays
from xlstm_mcore.parameters.init import initial_value, initialize
from xlstm_mcore.parameters.slices import named_slices, slices_of_range, stacked_slices


@pytest.fixture(scope="module", autouse=True)
def groups():
    return single_process_groups()


def model_of_every_kind(groups):
    """A model whose blocks have every kind of parameter of both papers."""
    section = {"hidden_size": 32, "num_heads": 2, "vocab_size": 40, "round_up_to": 16}
    section |= {"pattern": "Mms", "norm": "layernorm", "conv_width": 3, "qkv_block_size": 8}
    (model,) = build_model(make_config(section), groups, seed=1)
    return model


class TestInitialisation:
    config = make_config({"pattern": "MmsM", "hidden_size": 64, "num_heads": 4, "vocab_size": 128})

    def value(self, name, shape, seed=0):
        return initial_value(name, shape, self.config, seed)

    def test_spread(self):
        small, wang = (2 / (5 * 64)) ** 0.5, 2 / (4 * 64**0.5)
        for name, std in {
            "embedding.word_embeddings.weight": small,
            "output_layer.weight": small,
            "decoder.layers.0.mixer.q_proj.weight": small,
            "decoder.layers.0.ffn.gate_proj.weight": small,
            "decoder.layers.1.mixer.z_proj.weight": small,
            "decoder.layers.2.mixer.igate.weight": small,
            "decoder.layers.0.mixer.out_proj.weight": wang,
            "decoder.layers.2.ffn.down_proj.weight": wang,
        }.items():
            assert self.value(name, (256, 256)).std().item() == pytest.approx(std, rel=0.02), name

    def test_constants(self):
        for name in (
            "decoder.layers.0.mixer.ogate.weight",
            "decoder.layers.0.mixer.igate.weight",
            "decoder.layers.1.mixer.fgate.weight",
            "decoder.layers.2.mixer.recurrent_weight",
        ):
            assert not self.value(name, (4, 4, 4, 4)).any(), name
        for name in ("decoder.final_norm.weight", "decoder.layers.1.mixer.learnable_skip"):
            assert torch.equal(self.value(name, (9,)), torch.ones(9))
        assert torch.equal(
            self.value("decoder.layers.0.mixer.igate.bias", (4,)), torch.full((4,), -10.0)
        )
        assert torch.equal(
            self.value("decoder.layers.1.mixer.fgate.bias", (4,)),
            torch.tensor([3.0, 4.0, 5.0, 6.0]),
        )
        assert self.value("decoder.layers.1.mixer.igate.bias", (4096,)).std().item() == (
            pytest.approx(0.1, rel=0.05)
        )

    def test_slstm_forget_bias_falls_from_5_to_minus_7(self):
        bias = self.value("decoder.layers.2.mixer.bias", (4, 4, 16))
        assert not bias[[0, 2, 3]].any()
        forget = bias[1, 0]
        assert forget[0] == 5 and forget[-1] == -7 and (forget.diff() < 0).all()
        power = 0.3 + 1.3 * 2 / 3
        assert forget[5].item() == pytest.approx(5 - 12 * (5 / 15) ** power, rel=1e-5)

    def test_of_the_baselines(self):
        """Mamba-2's time steps and decays (arXiv 2405.21060), and the LSTM's forget bias of 1."""
        config = make_config(
            {
                "pattern": "dls",
                "hidden_size": 64,
                "num_heads": 4,
                "vocab_size": 128,
                "slstm_recurrent_init": "normal",
            }
        )

        def value(name, shape):
            return initial_value(f"decoder.layers.{name}", shape, config, 0)

        steps = torch.nn.functional.softplus(value("0.mixer.dt_bias", (4096,)))
        assert 0.001 <= steps.min() < 0.0011 and 0.09 < steps.max() <= 0.1
        decays_ = value("0.mixer.a_log", (4096,)).exp()
        assert 1 <= decays_.min() < 1.1 and 15.9 < decays_.max() <= 16
        assert torch.equal(value("0.mixer.skip", (4,)), torch.ones(4))
        bias = value("1.mixer.bias", (4, 4, 16))
        assert torch.equal(bias[1], torch.ones(4, 16)) and not bias[[0, 2, 3]].any()
        recurrent = value("2.mixer.recurrent_weight", (4, 4, 64, 64))
        assert recurrent.std().item() == pytest.approx(1 / 8, rel=0.02)

    def test_depends_on_seed_and_name_only(self):
        name, shape = "decoder.layers.0.mixer.q_proj.weight", (8, 8)
        assert torch.equal(self.value(name, shape), self.value(name, shape))
        assert not torch.equal(self.value(name, shape), self.value(name, shape, seed=1))
        other = "decoder.layers.0.mixer.k_proj.weight"
        assert not torch.equal(self.value(name, shape), self.value(other, shape))

    def test_every_parameter_has_a_rule(self, groups):
        (model,) = build_model(self.config, groups, seed=0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
        initialize(model, self.config, 0)
        assert all(torch.isfinite(p).all() for p in model.parameters())


def test_weight_decay_has_the_papers_choice_by_kind(groups):
    model = model_of_every_kind(groups)
    names = {part.name for _, _, slices in named_slices(model) for part in slices}
    no_decay = {name for name in names if not decays(name)}
    assert {name.rsplit(".", 1)[-1] for name in names - no_decay} == {"weight"}
    assert "output_layer.weight" not in no_decay
    assert "decoder.layers.1.mixer.conv.weight" not in no_decay
    for kind in (
        "embedding.word_embeddings.weight",
        "decoder.layers.1.mixer.learnable_skip",
        "decoder.layers.2.mixer.recurrent_weight",
        "decoder.layers.0.mixer_norm.weight",
        "decoder.layers.0.mixer.head_norm.weight",
        "decoder.layers.2.mixer.bias",
        "decoder.layers.1.mixer.conv.bias",
        "decoder.final_norm.weight",
    ):
        assert kind in no_decay
    for _, _parameter, slices in named_slices(model):  # a parameter is one optimizer entry
        for kind in KINDS:
            for choice in (True, False):
                assert len({decays(part.name, {kind: choice}) for part in slices}) == 1


def test_weight_decay_can_be_chosen_by_kind():
    assert decays("embedding.word_embeddings.weight", {"embedding": True})
    assert not decays("decoder.layers.0.mixer.conv.weight", {"conv": False})
    assert decays("decoder.layers.0.mixer.igate.weight", {"conv": False})
    assert not decays("decoder.layers.0.mixer.igate.weight", {"projection": False})
    with pytest.raises(KeyError, match="no kind for decoder"):
        decays("decoder.layers.0.mixer.surprise")
    assert set(get_args(ParameterKind)) == set(KINDS)


def test_slices_cover_every_parameter_once(groups):
    model = model_of_every_kind(groups)
    for name, parameter, slices in named_slices(model):
        count = torch.zeros(parameter.shape)
        for part in slices:
            part.local(count).add_(1)
        assert (count == 1).all(), name


def test_a_dimension_that_does_not_divide_by_the_ranks_is_refused():
    with pytest.raises(ValueError, match=r"w: dimension 0 of \(6, 2\) does not divide by"):
        stacked_slices({"w": (6, 2)}, shard_dim=0, rank=0, size=4)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (4, 1, 3), (2, 2, 2, 3)])
def test_slices_of_a_flat_range_cover_it_in_order(shape):
    total = torch.Size(shape).numel()
    values = torch.arange(total).view(shape)
    for start in range(total):
        for end in range(start, total + 1):
            flat = []
            found = slices_of_range(shape, start, end)
            assert len(found) <= 2 * len(shape) - 1
            for offset, size, first in found:
                part = values[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))]
                assert part.shape == torch.Size(size) and part.flatten()[0] == first
                flat += part.flatten().tolist()
            assert flat == list(range(start, end))
