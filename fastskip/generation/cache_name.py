"""The name of the KV cache in the installed transformers, as an input and as an output field.

``past_key_values`` up to 5.23; ``cache`` from 5.24 on, where the old name is deprecated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg

OLD_NAME = "past_key_values"
_IS_OLD = OLD_NAME in {field.name for field in fields(BaseModelOutputWithPast)}
CACHE_NAME = OLD_NAME if _IS_OLD else "cache"

Method = TypeVar("Method", bound=Callable[..., Any])


def takes_old_name(method: Method) -> Method:
    """Lets ``method`` accept the cache under its old name too, with transformers' own warning.

    ``method`` itself only sees the current name.
    """
    if _IS_OLD:
        return method
    renamed: Method = deprecate_kwarg(OLD_NAME, version="6.0.0", new_name=CACHE_NAME)(method)
    return renamed
