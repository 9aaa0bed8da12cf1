"""Triton's interpreter, in less of its time.

It puts its own functions in the place of Triton's language, once for a kernel, and once more for
each function that the kernel calls, ``tl.sum`` included: there it looks through modules and classes
only to find them replaced already, in a quarter of all its time. Here it looks first.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any


def is_replaced(language: Any) -> bool:
    """Whether the interpreter's functions are in the place of this module's and of its tensors'."""
    from triton.language.core import is_builtin

    return not (is_builtin(language.load) or is_builtin(language.tensor.__add__))


def replace_once() -> None:
    """Have the interpreter replace for each function what is not replaced yet, and no more."""
    from triton import language
    from triton.runtime import interpreter

    replace = interpreter._patch_lang

    @functools.wraps(replace)
    def replace_what_is_not(function: Any) -> Any:
        seen = [value for value in function.__globals__.values() if inspect.ismodule(value)]
        languages = [module for module in seen if module in (language, language.core)]
        if languages and all(map(is_replaced, languages)):
            return interpreter._LangPatchScope()  # of nothing to be restored
        return replace(function)

    interpreter._patch_lang = replace_what_is_not
