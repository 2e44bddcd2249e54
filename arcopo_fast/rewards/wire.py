"""The protocol of a reward's client and server: safetensors over HTTP. No pickle; nothing is read before its size is known.

    GET  /health   -> JSON: rewards, fingerprints (of the rewards, by name), version, protocol, waiting (videos), max_bytes (of a request),
                   fps (null: the rewards need no rate)
    POST /score    frames [N, F, 3, H, W] float32, or uint8 for [0, 1] in steps of 1/255, with the metadata rewards and prompts, two JSON
                   lists of texts -> scores [N] float32, under each reward's name

Every other status than 200 comes with JSON, {"status": 413, "error": "one line"}. Where the server has a token, all requests need it
(Authorization: Bearer). The order of the frames' bytes is safetensors', little-endian.
"""

from __future__ import annotations

import ipaddress
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from arcopo_fast.errors import UserError

PROTOCOL = 1
CONTENT = "application/octet-stream"
TOKEN_VARIABLE = "ARCOPO_REWARD_TOKEN"
HOSTS_VARIABLE = "ARCOPO_REWARD_HOSTS"
MAX_HEADER = 1 << 20
"""Bytes of a request's safetensors header, prompts included."""
_SHORTEST_TOKEN = 16
_DTYPES = {"F32": torch.float32, "U8": torch.uint8}


class Malformed(ValueError):
    """A request or an answer that is not what this module describes. The message holds nothing of it."""


@dataclass(frozen=True)
class Header:
    """The question of a request, before its frames are read. shape: [N, F, 3, H, W]."""

    rewards: tuple[str, ...]
    prompts: list[str]
    shape: tuple[int, ...]
    dtype: torch.dtype


def pack(frames: Tensor, prompts: Sequence[str], rewards: Sequence[str]) -> bytes:
    """A request. frames [N, F, 3, H, W] float32 or uint8."""
    metadata = {"rewards": json.dumps(list(rewards)), "prompts": json.dumps(list(prompts))}
    return save({"frames": frames.cpu().contiguous()}, metadata)


def room_for_header(prompts: Sequence[str], rewards: Sequence[str]) -> int:
    """Return how many bytes of a request are not frames, at most: inside its header the lists are quoted once more."""
    return 1024 + 2 * len(json.dumps([*prompts, *rewards]))


def read_header(content: bytes | bytearray, size: int) -> Header:
    """The header of a request, checked.

    Args:
        content: the JSON header alone, without its length.
        size: bytes that follow it; they must be the frames and nothing else.

    Raises:
        Malformed: it is anything else.
    """
    document = _json(content)
    if not isinstance(document, dict) or set(document) != {"__metadata__", "frames"}:
        raise Malformed("the header must hold frames and __metadata__, and nothing else")
    metadata, entry = document["__metadata__"], document["frames"]
    if not isinstance(metadata, dict) or not isinstance(entry, dict):
        raise Malformed("frames and __metadata__ must be objects")
    rewards, prompts = (_texts(metadata.get(name), name) for name in ("rewards", "prompts"))
    if not rewards or len(set(rewards)) < len(rewards):
        raise Malformed("rewards must be a list of different names, at least one")

    dtype, shape = entry.get("dtype"), entry.get("shape")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise Malformed(f"frames must be {' or '.join(_DTYPES)}")
    if not isinstance(shape, list) or len(shape) != 5 or any(type(side) is not int or side < 1 for side in shape) or shape[2] != 3:
        raise Malformed("frames must be [N, F, 3, H, W], none of them empty")
    if len(prompts) != shape[0]:
        raise Malformed("there must be as many prompts as videos")
    if math.prod(shape) * _DTYPES[dtype].itemsize != size or entry.get("data_offsets") != [0, size]:
        raise Malformed("the frames' shape does not fit the length of the body")
    return Header(tuple(rewards), prompts, tuple(shape), _DTYPES[dtype])


def _json(content: bytes | bytearray | str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise Malformed("not valid JSON") from None


def _texts(value: Any, name: str) -> list[str]:
    texts = _json(value) if isinstance(value, str) else None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise Malformed(f"the metadata {name} must be a JSON list of texts")
    return texts


def to_uint8(frames: Tensor) -> Tensor:
    """[0, 1] -> whole steps of 1/255."""
    return (frames * 255).round().clamp(0, 255).to(torch.uint8)


def to_float32(frames: Tensor) -> Tensor:
    """Return frames as rewards take them, from either dtype."""
    return frames.float() / 255 if frames.dtype == torch.uint8 else frames


def pack_scores(scores: dict[str, Tensor]) -> bytes:
    """Return scores as the body of an answer."""
    return save({name: values.cpu().contiguous() for name, values in scores.items()})


def read_scores(content: bytes, rewards: Sequence[str], count: int) -> dict[str, Tensor]:
    """The scores [count] of every reward asked for.

    Raises:
        Malformed: it is anything else.
    """
    try:
        scores = load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise Malformed("not a safetensors body") from error
    if set(scores) != set(rewards) or any(values.shape != (count,) or values.dtype != torch.float32 for values in scores.values()):
        raise Malformed("not one float32 score for each video and reward")
    return {name: scores[name] for name in rewards}


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def token_may_go_to(host: str, port: int) -> bool:
    """Return whether a client may show its token to a host: a loopback, or one that the user has named in `HOSTS_VARIABLE`.

    Addresses come with a recipe, which may be a stranger's. The variable holds names or addresses as the recipe writes them, with commas
    between them, each with or without a :port.
    """
    named = {name.strip().lower() for name in os.environ.get(HOSTS_VARIABLE, "").split(",")}
    with_port = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return is_loopback(host) or host in named or with_port in named


def read_token(file: str | Path | None) -> str | None:
    """The token of a server: from a file, else from the environment, else none.

    Raises:
        UserError: the file cannot be read, or what it holds is no token.
    """
    if file is None:
        token, source = os.environ.get(TOKEN_VARIABLE), TOKEN_VARIABLE
        if token is None:
            return None
    else:
        source = str(file)
        try:
            token = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the token in {file}: {getattr(error, 'strerror', None) or 'it is not text'}") from None
    token = token.strip()
    if len(token) < _SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(f"{source} holds no token: expected at least {_SHORTEST_TOKEN} letters and digits, as from openssl rand -hex 32")
    return token
