"""Dataclasses of a configuration from and to plain values, and YAML."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from ..optional import need


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds one mapping.

    Raises:
        ValueError: for anything else, naming the file; also for whole numbers in another form than
            decimal digits.
        OSError: for a file that cannot be read.
    """
    yaml = yaml_module()
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _loader(yaml))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected YAML, got {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a YAML mapping, got {type(values).__name__}")
    return values


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's values with those of a file in their place, section by section: of a
    section the fields that the file does not have stay. A task is one whole.

    Example:
        >>> run = {"seed": 1, "model": {"cell": "gru", "name": "hazard"}}
        >>> merged(run, {"model": {"cell": "lstm"}})
        {'seed': 1, 'model': {'cell': 'lstm', 'name': 'hazard'}}
    """
    result = {**values, **changes}
    for name, section in values.items():
        change = changes.get(name)
        if name != "task" and isinstance(section, Mapping) and isinstance(change, Mapping):
            result[name] = {**section, **change}
    return result


def _loader(yaml: Any) -> Any:
    """A safe loader for which an integer is written as one: YAML 1.1 reads ``0123`` as 83,
    ``1_000`` as 1000 and ``12:30`` as 750, which are other codes."""

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        pass

    def integer(loader: Any, node: Any) -> int:
        found = yaml.SafeLoader.construct_yaml_int(loader, node)
        if node.value != str(found):
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"expected a decimal number or a string in quotes, got {node.value}, which YAML "
                f"reads as {found}",
                node.start_mark,
            )
        return found

    Loader.add_constructor("tag:yaml.org,2002:int", integer)
    return Loader


def yaml_module() -> Any:
    """PyYAML."""
    return need("yaml", "train", "the configuration of a run")


def flat(config: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Every field of nested dataclasses with its dotted name."""
    pairs = []
    for each in fields(config):
        value = getattr(config, each.name)
        if is_dataclass(value):
            pairs += flat(value, f"{prefix}{each.name}.")
        else:
            pairs.append((f"{prefix}{each.name}", value))
    return pairs


def plain(value: Any) -> Any:
    """Mappings, lists and what is in them, as YAML and JSON have them."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def from_dict(cls: Any, values: Any, where: str = "") -> Any:
    """A dataclass of nested mappings; what is not given has its default.

    Args:
        cls: the dataclass.
        values: a mapping.
        where: its dotted name, for messages.

    Raises:
        ValueError: for fields that there are not.
        TypeError: for values of another type.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"{where or 'config'}: expected a mapping, got {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    known = [each.name for each in fields(cls)]
    given: dict[str, Any] = {}
    for name, value in values.items():
        place = f"{where}.{name}" if where else str(name)
        if name not in known:
            raise ValueError(f"{place}: no such field; expected one of {', '.join(known)}")
        given[name] = _converted(hints[name], value, place)
    return cls(**given)


def _converted(kind: Any, value: Any, where: str) -> Any:
    if is_dataclass(kind):
        return from_dict(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (kind,) = (a for a in arguments if a is not type(None))
        return _converted(kind, value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{where}: expected a list, got {value!r}")
        return tuple(_converted(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise TypeError(f"{where}: expected a mapping, got {value!r}")
        return dict(value)
    return _scalar(kind, value, where)


def _scalar(kind: type, value: Any, where: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, kind) and not (kind is not bool and isinstance(value, bool)):
        return value
    raise TypeError(f"{where}: expected {kind.__name__}, got {value!r}")
