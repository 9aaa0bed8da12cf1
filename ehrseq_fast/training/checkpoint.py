"""Checkpoints: one safetensors file each, tensors and JSON alone, so that loading runs no code.

A file holds the tensors ``model/NAME`` and ``optimizer/NAME/KEY``, where ``NAME`` is a parameter's
or buffer's, whole, whatever number of processes trains; and under one metadata key the state of the
run as JSON with a SHA-256 of all that the file holds. It is written under another name, synced and
renamed: a crash leaves the checkpoint or none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..optional import need
from .files import replacing

# One key: several are written in an order that differs from process to process.
_KEY = "ehrseq_fast"
_SUFFIX = ".safetensors"


class CheckpointError(ValueError):
    """A file that is no whole checkpoint; the message names it."""


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        path: the file.
        tensors: by the names above.
        state: the JSON.
    """

    path: Path
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save_tensors(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write a file of tensors and JSON, atomically; equal contents give equal bytes.

    Raises:
        OSError: where it cannot be written, as on a disk that is full, naming the file.
    """
    safetensors = need("safetensors.torch", "train", "saving weights")
    from safetensors import SafetensorError

    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(state, sort_keys=True)
    metadata = {"state": text, "sha256": _digest(on_host, text)}
    with replacing(path) as temporary:
        try:
            safetensors.save_file(on_host, temporary, {_KEY: json.dumps(metadata, sort_keys=True)})
        except SafetensorError as error:  # which names no file
            raise OSError(f"{path}: cannot be written: {error}") from error


def load_tensors(path: Path) -> Checkpoint:
    """Read and verify what :func:`save_tensors` wrote.

    Raises:
        CheckpointError: for a file that is cut off, changed or of another kind, naming it.
        OSError: for one that cannot be read.
    """
    need("safetensors", "train", "loading weights")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
        text, digest = _metadata(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: expected a whole safetensors file, got {error}") from error
    if _digest(tensors, text) != digest:
        raise CheckpointError(f"{path}: its content does not have the checksum written with it")
    return Checkpoint(path, tensors, json.loads(text))


def load_state(path: Path) -> dict[str, Any]:
    """The JSON of a file alone, unverified."""
    return json.loads(_metadata(path)[0])


def _metadata(path: Path) -> tuple[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            held = json.loads((file.metadata() or {})[_KEY])
        return held["state"], held["sha256"]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: expected a file written by ehrseq_fast") from error


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        if tensor.numel():  # one of no elements may have strides that cannot be viewed as bytes
            content: Any = tensor.reshape(-1).view(torch.uint8).numpy()
            digest.update(content)
    return digest.hexdigest()


# Model and optimizer <-> tensors


def tensors_of(model: nn.Module, optimizer: Optimizer, *, keep: bool = True) -> dict[str, Tensor]:
    """Parameters, buffers and optimizer state, whole, on the host.

    Of a model whose parameters are divided between processes (``DTensor``) all processes must call;
    with ``keep=False`` a process takes part, but holds no more than one whole tensor at a time.
    """
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):
            tensors[f"optimizer/{name}/{key}"] = value
    found = {}
    for name, tensor in tensors.items():
        all_of_it = whole(tensor)
        if keep:
            found[name] = all_of_it
    return found


def restore(model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put the tensors of :func:`tensors_of` into a model and an optimizer of the same shapes.

    Raises:
        ValueError: for names or shapes that do not fit, naming the first.
    """
    load_weights(model, weights_of(tensors))
    fused = any(group.get("fused") for group in optimizer.param_groups)
    for name, parameter in model.named_parameters():
        prefix = f"optimizer/{name}/"
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        for key, value in state.items():
            if value.shape == parameter.shape and key != "step":
                state[key] = _divided_as(parameter, value)
            else:
                state[key] = value.to(parameter.device if fused else "cpu")
        if state:
            optimizer.state[parameter] = state


def weights_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's part of a checkpoint's tensors, by the names of its ``state_dict``."""
    return {k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")}


@torch.no_grad()
def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy whole weights into a model, divided between processes or not.

    Raises:
        ValueError: for names or shapes that do not fit, naming the first.
    """
    targets = model.state_dict()
    if targets.keys() != weights.keys():
        missing, more = sorted(targets.keys() - weights), sorted(weights.keys() - targets)
        raise ValueError(f"weights: missing {missing or 'none'}, unexpected {more or 'none'}")
    for name, target in targets.items():
        if weights[name].shape != target.shape:
            raise ValueError(
                f"weights: {name}: expected shape {list(target.shape)}, got "
                f"{list(weights[name].shape)}"
            )
        target.copy_(_divided_as(target, weights[name]))


def whole(tensor: Tensor) -> Tensor:
    """A tensor, or all parts of a DTensor, on the host, without gradient."""
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.cpu()


def _divided_as(like: Tensor, full: Tensor) -> Tensor:
    """``full`` on the device of ``like``, and divided between processes as it is."""
    full = full.to(like.device, copy=True)
    mesh = getattr(like, "device_mesh", None)
    if mesh is None:
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


# A run's checkpoints


class Checkpoints:
    """The checkpoints in a folder, ``step-0000000120.safetensors`` and so on.

    Args:
        folder: made where it is missing.
        keep_last: how many stay; besides, those that a kept one names as ``state["best"]``.
    """

    def __init__(self, folder: Path, keep_last: int) -> None:
        self.folder = folder
        self.keep_last = keep_last

    def name(self, step: int) -> str:
        """The file's name of the checkpoint after so many steps."""
        return f"step-{step:010d}{_SUFFIX}"

    def paths(self) -> list[Path]:
        """All, from the first to the last step."""
        return sorted(self.folder.glob(f"step-*{_SUFFIX}"))

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        """Write one and delete those that need not stay."""
        path = self.folder / self.name(step)
        save_tensors(path, tensors, state)
        kept = {each.name: each for each in self.paths()[-self.keep_last :]}
        best = {load_state(each).get("best") for each in kept.values()}
        for each in self.paths():
            if each.name not in kept and each.name not in best:
                each.unlink()
        return path

    def latest(self) -> tuple[Checkpoint | None, list[str]]:
        """The last whole checkpoint whose best one is whole too, None where there are no files; and
        what is wrong with later ones.

        Raises:
            CheckpointError: where there are files and none is whole.
        """
        wrong: list[str] = []
        for path in reversed(self.paths()):
            try:
                found = load_tensors(path)
                best = found.state.get("best")
                if best is not None and best != path.name:
                    load_tensors(self.folder / best)
            except (CheckpointError, FileNotFoundError) as error:
                wrong.append(str(error))
                continue
            return found, wrong
        if wrong:
            raise CheckpointError(
                f"{self.folder}: no whole checkpoint ({'; '.join(wrong)}); delete the folder to "
                "start this run from its beginning"
            )
        return None, wrong
