"""Digests by which results of different configurations are told apart."""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any


def json_values(config: Any, leave_out: Collection[str] = ()) -> dict[str, Any]:
    """The fields of a configuration class as JSON values, all but some."""
    values = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return {k: v for k, v in values.items() if k not in leave_out}


def digest(values: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits of JSON values, whatever their order."""
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
