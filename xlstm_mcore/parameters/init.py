"""Initialisation by global name: the same seed gives the same weights on every layout.

Every global tensor has its own random stream, seeded by the run's seed and the tensor's name,
and every rank copies its slices from the whole. Nothing depends on the order in which modules are
built or on how they are sharded. Formulas: those of the papers' own code
(small init: Nguyen and Salazar 2019; wang init: Wang and Komatsuzaki, GPT-J; Mamba-2's own
parameters: Dao and Gu 2024, arXiv 2405.21060).
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from xlstm_mcore.config import XLSTMConfig
from xlstm_mcore.parameters.slices import named_slices

Rule = Callable[[Tensor, XLSTMConfig, int, torch.Generator], None]


def _small(t: Tensor, config: XLSTMConfig, layer: int, rng: torch.Generator) -> None:
    t.normal_(0.0, math.sqrt(2 / (5 * config.hidden_size)), generator=rng)


def _wang(t: Tensor, config: XLSTMConfig, layer: int, rng: torch.Generator) -> None:
    t.normal_(0.0, 2 / (config.num_layers * math.sqrt(config.hidden_size)), generator=rng)


def _ones(t: Tensor, config: XLSTMConfig, layer: int, rng: torch.Generator) -> None:
    t.fill_(1.0)


def _gate(t: Tensor, config: XLSTMConfig, layer: int, rng: torch.Generator) -> None:
    """Headwise projections of the input in the sLSTM; the mLSTM's gates start from their biases."""
    if config.layer_letters[layer] in "sl":
        _small(t, config, layer, rng)
    else:
        t.zero_()


def _conv(t: Tensor, config: XLSTMConfig, layer: int, rng: torch.Generator) -> None:
    width = config.slstm_taps if config.layer_letters[layer] in "sl" else config.conv_width
    bound = 1 / math.sqrt(width)  # torch's Conv1d default at one input channel
    t.uniform_(-bound, bound, generator=rng)


def _recurrent(t: Tensor, config: XLSTMConfig, layer: int, rng: torch.Generator) -> None:
    if config.slstm_recurrent_init == "normal":
        t.normal_(0.0, 1 / math.sqrt(t.shape[-2]), generator=rng)
    else:
        t.zero_()


def _a_log(t: Tensor, config: XLSTMConfig, layer: int, rng: torch.Generator) -> None:
    t.uniform_(1.0, 16.0, generator=rng).log_()


def _dt_bias(t: Tensor, config: XLSTMConfig, layer: int, rng: torch.Generator) -> None:
    """Time steps from 0.001 to 0.1, uniform in their logarithm; softplus gives them back."""
    dt = t.uniform_(math.log(1e-3), math.log(1e-1), generator=rng).exp()
    t.copy_(dt + torch.log(-torch.expm1(-dt)))


def _fgate_bias(t: Tensor, config: XLSTMConfig, layer: int, rng: torch.Generator) -> None:
    t.copy_(torch.linspace(3.0, 6.0, t.numel()))


def _igate_bias(t: Tensor, config: XLSTMConfig, layer: int, rng: torch.Generator) -> None:
    if config.layer_letters[layer] == "M":
        t.fill_(config.igate_bias_init)
    else:
        t.normal_(0.0, 0.1, generator=rng)


def _slstm_bias(t: Tensor, config: XLSTMConfig, layer: int, rng: torch.Generator) -> None:
    """Zero except for the forget gate: it falls from 5 to -7 over a head's channels; 1 in `l`."""
    if config.layer_letters[layer] == "l":
        t.zero_()
        t[1] = 1.0
        return
    depth = layer / max(1, config.num_layers - 1)
    position = torch.arange(t.shape[-1]) / max(1, t.shape[-1] - 1)
    t.zero_()
    t[1] = 5.0 - 12.0 * position ** (0.3 + 1.3 * depth)


_RULES: list[tuple[str, Rule]] = [
    (r"embedding\..*", _small),
    (r"output_layer\.weight", _small),
    (r".*norm\.weight", _ones),
    (r".*\.(learnable_skip|skip)", _ones),
    (r".*\.(q|k|v|up|z|gate|x|b|c|dt)_proj\.weight", _small),
    (r".*\.(out|down)_proj\.weight", _wang),
    (r".*\.[ifzo]gate\.weight", _gate),
    (r".*\.([xbc]_)?conv\.(weight|bias)", _conv),
    (r".*\.recurrent_weight", _recurrent),
    (r".*\.a_log", _a_log),
    (r".*\.dt_bias", _dt_bias),
    (r".*\.mixer\.bias", _slstm_bias),
    (r".*\.igate\.bias", _igate_bias),
    (r".*\.fgate\.bias", _fgate_bias),
]


def initial_value(name: str, shape: Iterable[int], config: XLSTMConfig, seed: int) -> Tensor:
    """The initial value (fp32, CPU, global shape) of a global tensor.

    Args:
        name: Global name.
        shape: Its global shape.
        config: The model's configuration.
        seed: The run's seed.

    Raises:
        KeyError: No rule fits the name.
    """
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    rng = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    match = re.match(r"decoder\.layers\.(\d+)\.", name)
    layer = int(match.group(1)) if match else 0
    value = torch.empty(tuple(shape))
    for pattern, rule in _RULES:
        if re.fullmatch(pattern, name):
            rule(value, config, layer, rng)
            return value
    raise KeyError(f"no initialisation for {name}")


@torch.no_grad()
def leave_open(model: nn.Module) -> None:
    """Fill every parameter with NaN, for a checkpoint that is read into all of them.

    What it should leave out is noticed at once then. Drawing values for nothing takes a rank of a
    large model as long as reading the checkpoint.
    """
    for parameter in model.parameters():
        parameter.fill_(torch.nan)


@torch.no_grad()
def initialize(model: nn.Module, config: XLSTMConfig, seed: int) -> None:
    """Fill every parameter of a model (or pipeline stage) with its initial value.

    Beyond the model this takes the memory of one global tensor at a time.
    """
    for _, parameter, slices in named_slices(model):
        for part in slices:
            value = initial_value(part.name, part.global_shape, config, seed)
            part.local(parameter).copy_(part.of_global(value))
