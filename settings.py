"""How settings are declared, checked and read; what they are stands in config.py.

A setting is a field of a dataclass made by `number`, `choice` or `setting`; a dataclass of such
dataclasses is a configuration, whose settings go by dotted keys (`train.lr`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
from dataclasses import field
from pathlib import Path
from typing import Any

import yaml


class ConfigError(Exception):
    """A setting that cannot be: one sentence with the key, the value and what is allowed."""


def number(default: float, low: float, high: float, note: str) -> Any:
    """A dataclass field for a number within [low, high]."""
    return field(default=default, metadata={"low": low, "high": high, "help": note})


def choice(default: str, options: tuple[str, ...], note: str) -> Any:
    """A dataclass field that takes one of `options`."""
    return field(default=default, metadata={"options": options, "help": note})


def setting(default: Any, note: str) -> Any:
    """A dataclass field of free text or a switch."""
    return field(default=default, metadata={"help": note})


def keys(config: Any) -> dict[str, dataclasses.Field]:
    """All dotted keys with their fields."""
    found = {}
    for section in dataclasses.fields(config):
        for leaf in dataclasses.fields(getattr(config, section.name)):
            found[f"{section.name}.{leaf.name}"] = leaf
    return found


def closest(word: str, known: list[str] | tuple[str, ...]) -> str:
    """' Did you mean x?' when something is near, else an empty string."""
    near = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""


def assign(config: Any, key: str, value: Any, source: str) -> None:
    """Set one dotted key after checking its type and range.

    Raises ConfigError for an unknown key (with the nearest known one) or a value out of range.
    """
    fields = keys(config)
    if key not in fields:
        ends = {known.split(".")[-1]: known for known in fields}
        hint = closest(key, list(fields)) or (
            f" Did you mean '{ends[near[0]]}'?"
            if (near := difflib.get_close_matches(key.split(".")[-1], list(ends), n=1))
            else ""
        )
        raise ConfigError(f"{source}: there is no setting '{key}'.{hint}")
    section, leaf = key.split(".")
    current = getattr(getattr(config, section), leaf)
    setattr(getattr(config, section), leaf, _checked(fields[key], current, value, key, source))


_KINDS = {"bool": bool, "int": int, "float": float, "str": str, "dict": dict}


def check_defaults(config: Any, source: str) -> None:
    """Hold every setting of a fresh configuration to its own declaration; raises ConfigError."""
    for key, leaf in keys(config).items():
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        setattr(getattr(config, section), name, _checked(leaf, value, value, key, source))


def _checked(leaf: dataclasses.Field, current: Any, value: Any, key: str, source: str) -> Any:
    # as declared: a default edited in config.py may itself be of another type
    kind = _KINDS.get(str(leaf.type), type(current))
    if kind is str and isinstance(value, bool) and "off" in leaf.metadata.get("options", ()):
        value = "on" if value else "off"  # YAML reads these words as true and false
    if kind is bool:
        words = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}
        value = words.get(str(value).lower(), value)
    elif kind in (int, float) and not isinstance(value, bool):
        value = _to_number(value, kind)
    elif kind is dict and isinstance(value, str):
        # what is no mapping is refused below; an impossible date is a ValueError
        with contextlib.suppress(yaml.YAMLError, ValueError):
            value = yaml.safe_load(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise ConfigError(f"{source}: {key} wants {_kind_name(kind)}, not {value!r}.")
    limits = leaf.metadata
    if "options" in limits and value not in limits["options"]:
        raise ConfigError(
            f"{source}: {key} is one of {', '.join(limits['options'])}, not '{value}'."
            + closest(str(value), limits["options"])
        )
    if "low" in limits and not (limits["low"] <= value <= limits["high"]):
        raise ConfigError(
            f"{source}: {key} lies between {limits['low']:g} and {limits['high']:g}, not {value!r}."
        )
    return value


def _to_number(value: Any, kind: type) -> Any:
    try:
        converted = float(value)
    except (TypeError, ValueError, OverflowError):
        return value
    if not math.isfinite(converted) or (kind is int and converted != int(converted)):
        return value
    return kind(converted)


def _kind_name(kind: type) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return names.get(kind, "a mapping such as {text: 48}")


def read_pairs(texts: list[str]) -> dict[str, str]:
    """Dotted key -> text of `--set` flags such as "train.lr=0.001". Raises ConfigError."""
    given = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator:
            raise ConfigError(f"--set {text}: write it as key=value.")
        given[key.strip()] = value.strip()
    return given


class _EachKeyOnce(yaml.SafeLoader):
    """YAML whose mappings have no key twice: the second would replace the first without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """As in SafeLoader. Raises MarkedYAMLError for a repeated key."""
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                said = f"{key.value!r} is there twice"
                raise yaml.MarkedYAMLError(problem=said, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_sections(path: str, sections: set[str]) -> dict[str, Any]:
    """Dotted key -> value of a YAML file of sections (`train: {lr: 0.001}`) or dotted keys.

    Raises ConfigError when the file is missing, is not YAML or is not a mapping.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _EachKeyOnce)
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}.") from None
    except (yaml.YAMLError, ValueError) as error:  # bytes or a date that cannot be: ValueError
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"--config {path}{where} is not YAML: {problem}.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path}: expected sections such as 'train:', found none.")
    flat = {}
    for key, value in content.items():
        if key in sections and isinstance(value, dict):
            flat |= {f"{key}.{leaf}": inner for leaf, inner in value.items()}
        else:
            flat[str(key)] = value
    return flat
