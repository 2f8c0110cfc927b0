"""Files of `torch.save`, compressed: most of a small one is padding."""

from __future__ import annotations

import io
import lzma
from pathlib import Path
from typing import Any

import torch


def saved(tree: Any) -> bytes:
    file = io.BytesIO()
    torch.save(tree, file)
    return file.getvalue()


def loaded(content: bytes) -> Any:
    """What `saved` was given, as tensors of its own; runs no code of the file."""
    return torch.load(io.BytesIO(content), weights_only=True)


def pack(content: bytes, path: Path) -> None:
    path.write_bytes(lzma.compress(content, preset=9))


def unpacked(path: Path) -> bytes:
    return lzma.decompress(path.read_bytes())


def write(tree: Any, path: Path) -> None:
    pack(saved(tree), path)


def read(path: Path) -> Any:
    return loaded(unpacked(path))
