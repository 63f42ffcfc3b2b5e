"""What commands print for other programs."""

import json
import math
from typing import Any


def print_json(data: Any) -> None:
    """Strict JSON: a number that is not finite is null, what JSON has no form for is written as Python prints it."""
    print(json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False, default=str))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
