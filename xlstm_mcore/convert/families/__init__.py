"""Foreign formats, one module each: table of tensors, configuration, and what it cannot express.

Every module has `NAME` (the `model_type` of its config.json), `TABLE`, `NOTES` for the card,
`unsupported_reason(model)` and `config(model)`.
"""

from types import ModuleType

from xlstm_mcore.convert.errors import ConvertError
from xlstm_mcore.convert.families import custom, llama, native_xlstm
from xlstm_mcore.settings import ModelConfig

#: By name; an export takes the first that can express the model.
FAMILIES: dict[str, ModuleType] = {family.NAME: family for family in (native_xlstm, llama, custom)}


def choose(model: ModelConfig, name: str | None = None) -> ModuleType:
    """The family to export a model as.

    Args:
        model: The model.
        name: The family that is asked for; None for the first that can express the model.

    Raises:
        ConvertError: The family that is asked for cannot express the model.
    """
    if name is None:
        for family in FAMILIES.values():
            if family.unsupported_reason(model) is None:
                return family
        raise ConvertError(
            f"{custom.unsupported_reason(model)}, so this model has no export; evaluate and "
            "generate read its checkpoints directly"
        )
    reason = FAMILIES[name].unsupported_reason(model)
    if reason is not None:
        raise ConvertError(f"{reason}, so this model cannot be exported exactly as {name}")
    return FAMILIES[name]
