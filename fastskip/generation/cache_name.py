"""The name of a cache in the installed transformers: as an input, and as a field of outputs.

It is ``past_key_values`` up to 5.23; from 5.24 on it is ``cache``, and the old name is deprecated.
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
    """``method`` takes a cache by its old name too, with the warning of transformers' own methods.

    It sees the current name alone.
    """
    if _IS_OLD:
        return method
    renamed: Method = deprecate_kwarg(OLD_NAME, version="6.0.0", new_name=CACHE_NAME)(method)
    return renamed
