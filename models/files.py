"""Tensors and JSON on disk: written atomically, read without pickle, refused in three lines when damaged."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from certify.errors import InvalidFile

#: First bytes of torch.save archives (zip) and of plain pickles.
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def write(contents: Mapping[Path, bytes]) -> None:
    """Write all files, each whole or not at all: temporary files first, then one rename after the other.

    A new file has the mode that the umask leaves, a file that was there keeps its own.
    Raises ``InvalidFile`` where they cannot be written (a full disk, a folder that is read-only); the files that were
    there stay.
    """
    staged: list[tuple[Path, Path]] = []
    try:
        for path, data in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
            with temporary.open("xb") as file:  # fails where it exists, never follows a link
                staged.append((temporary, path))
                if path.exists():
                    os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))  # before there is anything to read
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for temporary, path in staged:
            temporary.replace(path)
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise InvalidFile(
            f"cannot write {error.filename or ', '.join(map(str, contents))}: {reason}",
            "a folder that can be written to, with room",
            "free some space or choose another folder; what was there before is whole",
        ) from None
    finally:
        for temporary, _ in staged:
            temporary.unlink(missing_ok=True)


def prepare(folder: Path) -> None:
    """Make the folder and try to write there, before work whose fruits are to lie in it. Raises ``InvalidFile``."""
    trial = folder / f".trial.{secrets.token_hex(4)}"
    write({trial: b""})
    trial.unlink(missing_ok=True)


def tensor_digest(tensors: Mapping[str, Any]) -> str:
    """Return a SHA-256 of names, types, shapes and values; of what is no tensor, as a module's own state, in words."""
    found = hashlib.sha256()
    for name, value in sorted(tensors.items(), key=lambda item: item[0]):
        if not isinstance(value, Tensor):
            found.update(json.dumps([name, repr(value)]).encode())
            continue
        found.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def pack(tensors: Mapping[str, Tensor], header: Mapping[str, Any] | None = None) -> bytes:
    """Return the bytes of a safetensors file that also carries ``header`` as JSON, and a hash of the tensors."""
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    words = {"json": json.dumps(header or {}, allow_nan=False), "sha256": tensor_digest(plain)}
    return safetensors.torch.save(plain, words)


def unpack(path: Path, data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and header of a safetensors file's bytes. Raises ``InvalidFile`` for anything else."""
    if data.startswith(_PICKLES):
        raise InvalidFile(
            f"{path} is a pickle (torch.save), not a checkpoint",
            "a .safetensors file with its .json, as `certify train` writes them",
            "--model package.module:factory --weights FILE reads a state_dict",
        )
    try:
        tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        words = json.loads(data[8 : 8 + length]).get("__metadata__", {})
        header = json.loads(words.get("json", "{}"))
        if "sha256" in words and words["sha256"] != tensor_digest(tensors):  # files of others carry none
            raise ValueError("other tensors than were written")
    except (safetensors.SafetensorError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise InvalidFile(
            f"{path} is damaged or truncated ({type(error).__name__})",
            "a whole safetensors file",
            "copy it again, or train again",
        ) from None
    return tensors, header


def read_bytes(path: Path) -> bytes:
    """Return the file's bytes. Raises ``InvalidFile`` where there is no readable file."""
    try:
        return path.read_bytes()
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise InvalidFile(f"cannot read {path}: {reason}", "a readable file", "check the path") from None


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in the file. Raises ``InvalidFile`` for anything else."""
    try:
        value = json.loads(read_bytes(path))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InvalidFile(f"{path} is not JSON, or is truncated", "a JSON object", "copy it again")
    return value


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return a state_dict from .safetensors, or from torch.save with ``weights_only=True``, never else."""
    if path.suffix == ".safetensors":
        return unpack(path, read_bytes(path))[0]
    read_bytes(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each raise their own
        raise InvalidFile(
            f"{path} is damaged, or holds more than tensors ({type(error).__name__})",
            "a state_dict that torch.load(weights_only=True) reads",
            "torch.save(model.state_dict(), FILE)",
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InvalidFile(
            f"{path} holds no flat state_dict", "names with tensors", "torch.save(model.state_dict(), FILE)"
        )
    return state
