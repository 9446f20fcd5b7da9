"""Engines: what a training step does to a model, behind one small protocol."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.config import RunConfig
    from pretrain.engines.base import Engine
    from pretrain.layout import Layout


def make_engine(config: "RunConfig", layout: "Layout", *, initial_values: bool = True) -> "Engine":
    """The engine that `config.engine.name` asks for; only that one's packages are imported.

    Args:
        config: the run, checked.
        layout: the process layout the run was started on.
        initial_values: whether weights have these, or are NaN until `load_sharded_state`.
    """
    if config.engine.name == "deepspeed":
        from pretrain.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(config, layout, initial_values=initial_values)
    from pretrain.engines.megatron import MegatronEngine

    return MegatronEngine(config, layout, initial_values=initial_values)
