"""YAML files of sections, with keys that are given once."""

import os
from pathlib import Path
from typing import Any

import yaml

from xlstm_io.errors import ConfigError


class UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Construct one mapping; ConfigError names a key that it has twice, with its line."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ConfigError(
                    f"line {key_node.start_mark.line + 1}: {key} is given twice; keep one"
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """The file's values as nested dicts; ConfigError if it is missing or not a YAML mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path} does not exist; give the path of a run file, such as "
            "pretrain/configs/cpu_demo.yaml"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text ({error}); give a YAML file") from error
    try:
        raw = yaml.load(text, Loader=UniqueKeyLoader)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path} holds no sections; a run file starts with sections such as run:, model:, data:"
        )
    return {str(name): {} if value is None else value for name, value in raw.items()}
