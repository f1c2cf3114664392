"""Reading the JSON files of a model folder, with errors that name the file and the field.

Knows no model: what the fields mean is said where they are read.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TypeVar

from embedq.model.errors import ModelFormatError

T = TypeVar("T", bound=int | float | str)


def read_json(path: Path) -> Any:
    """Raises ModelFormatError if the file is missing or no JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as err:
        raise ModelFormatError(f"{path} is missing: is this the folder of a whole model?") from err
    except (ValueError, OSError, RecursionError) as err:
        # ValueError: broken JSON and broken UTF-8 alike; RecursionError: lists in lists in lists.
        raise ModelFormatError(f"{path} cannot be read as JSON: {err}; fetch the file again") from err


def read_json_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise ModelFormatError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def read_optional_json_object(path: Path) -> dict[str, Any]:
    """Empty if there is no such file."""
    return read_json_object(path) if path.exists() else {}


def require(content: dict[str, Any], field: str, kind: type[T], path: Path) -> T:
    """The field's value; a whole number will do where a float is asked for."""
    if field not in content:
        raise ModelFormatError(f"{path}: field {field!r} is missing")
    value = content[field]
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return kind(_finite(value, field, path))
    # bool is an int to isinstance, but no size.
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ModelFormatError(f"{path}: field {field!r} must be {kind.__name__}, not {value!r}")
    return value


def _finite(value: float, field: str, path: Path) -> float:
    """JSON has no infinity and no limit to its digits; Python's reader takes both."""
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ModelFormatError(f"{path}: field {field!r} must be a finite number")
    return number
