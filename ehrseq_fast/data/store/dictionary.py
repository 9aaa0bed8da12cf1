"""The dictionary, of every code, and the vocabulary, of those that the training split has."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .format import DICTIONARY, FIRST_CODE, UNKNOWN, read_json, write_json

MOST_CODES = 2**31 - 1 - FIRST_CODE


def united(parts: Iterable[Sequence[str]]) -> list[str]:
    """Every code of the parts once, in the order of their code points."""
    found: set[str] = set()
    for part in parts:
        found.update(part)
    codes = sorted(found)
    if len(codes) > MOST_CODES:
        raise ValueError(f"codes: expected at most {MOST_CODES} distinct ones, got {len(codes)}")
    return codes


def places(codes: Sequence[str], dictionary: Mapping[str, int]) -> NDArray[np.int32]:
    """int32 ``[n]``: the dictionary's index of each code of a part."""
    return np.fromiter((dictionary[code] for code in codes), np.int32, len(codes))


def fitted_vocabulary(occurrences: NDArray[np.int64], min_count: int) -> NDArray[np.int32]:
    """int32 ``[D]``, from the dictionary's index to a model's code: 1 is unknown, 2 and above are
    the codes that occur at least ``min_count`` times in the training split."""
    kept = occurrences >= max(min_count, 1)
    vocabulary = np.full(len(occurrences), UNKNOWN, np.int32)
    vocabulary[kept] = np.arange(FIRST_CODE, FIRST_CODE + np.count_nonzero(kept), dtype=np.int32)
    return vocabulary


def write_dictionary(
    folder: Path, codes: Sequence[str], descriptions: Mapping[str, str] | None
) -> dict[str, Any]:
    """Write the file; its entry in the header."""
    known = descriptions or {}
    names = [known.get(code) or "" for code in codes]
    data = write_json(folder / DICTIONARY, {"codes": list(codes), "descriptions": names})
    return {"size": len(codes), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def read_dictionary(folder: Path, size: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Codes and descriptions.

    Raises:
        ValueError: a file that is no dictionary, or one of another size.
    """
    path = folder / DICTIONARY
    content = read_json(path, "a dictionary")
    lists = []
    for key in ("codes", "descriptions"):
        found = content.get(key) if isinstance(content, dict) else None
        if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
            raise ValueError(f"{path}: expected a list of strings named {key!r}")
        if len(found) != size:
            raise ValueError(f"{path}, {key}: expected {size}, got {len(found)}")
        lists.append(tuple(found))
    return lists[0], lists[1]


def matching(
    codes_of: Sequence[str],
    index: Mapping[str, int],
    codes: Iterable[str | int] | str | int | None,
    prefix: str | Sequence[str] | None,
) -> NDArray[np.bool_]:
    """bool ``[D]``: the codes that are listed or begin with one of the prefixes.

    Raises:
        LookupError: a code, or a prefix, of no record.
        ValueError: neither codes nor a prefix.
    """
    wanted = [codes] if isinstance(codes, (str, int)) else list(codes or ())
    prefixes = [prefix] if isinstance(prefix, str) else list(prefix or ())
    if not wanted and not prefixes:
        raise ValueError("codes, prefix: expected at least one code or prefix, got none")
    mask = np.zeros(len(codes_of), bool)
    for code in map(str, wanted):
        if code not in index:
            near = difflib.get_close_matches(code, codes_of, 5, 0.6)
            raise LookupError(
                f"codes: expected codes that occur in the store, got {code!r}"
                + (f" (near it: {', '.join(map(repr, near))})" if near else "")
            )
        mask[index[code]] = True
    for start in prefixes:
        if not isinstance(start, str) or not start:
            raise ValueError(f"prefix: expected strings that are not empty, got {start!r}")
        found = np.fromiter((code.startswith(start) for code in codes_of), bool, len(codes_of))
        if not found.any():
            raise LookupError(f"prefix: expected the start of a code in the store, got {start!r}")
        mask |= found
    return mask
