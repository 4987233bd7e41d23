"""Random streams by name: a draw depends on what it is for, never on what was drawn before it.

Each sample has one uniform per step, from a counter-based generator keyed by a digest of (seed, round,
prompt id, sample index). So a text depends on its own key alone: not on batch size, order, subset,
restart or backend.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

BLOCK = 64
"""Uniforms come in blocks of this many steps, so that a long answer costs no more than it uses."""


def digest(*parts: object) -> bytes:
    """16 bytes that name a stream. Parts are joined by their lengths, so no two lists of parts collide."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        raw = part if isinstance(part, bytes) else str(part).encode()
        state.update(len(raw).to_bytes(8, "little") + raw)
    return state.digest()


def sample_key(seed: int, round_: int, prompt_id: str, index: int) -> bytes:
    """Name of the stream of one sampled answer."""
    return digest("sample", seed, round_, prompt_id, index)


def grade_key(seed: int, round_: int, sample_id: str, answer: int, try_: int) -> bytes:
    """Name of the stream of one drawn grade of an answer."""
    return digest("grade", seed, round_, sample_id, answer, try_)


def generator(key: bytes, block: int = 0) -> np.random.Generator:
    """A Philox generator at the given block of the stream named by `key` (16 bytes)."""
    words = np.frombuffer(key, dtype="<u8").astype(np.uint64)
    return np.random.Generator(np.random.Philox(key=words, counter=np.array([0, 0, 0, block], dtype=np.uint64)))


def uniforms(key: bytes, block: int) -> NDArray[np.float32]:
    """The uniforms in (0, 1) of steps block*BLOCK ... (block+1)*BLOCK-1, float32: MLX's Metal has no float64."""
    draws = generator(key, block).random(BLOCK).astype(np.float32)
    return np.clip(draws, np.float32(1e-7), np.float32(1 - 1e-7))


def shuffled(count: int, *parts: object) -> NDArray[np.int64]:
    """A permutation of range(count), named by `parts`."""
    return generator(digest("shuffle", *parts)).permutation(count)


def lora_a(seed: int, module: str, rank: int, inputs: int) -> NDArray[np.float32]:
    """Initial A matrix [rank, inputs] of a module's adapter, uniform in +-1/sqrt(inputs) (as PEFT draws it).

    Made here so that both frameworks start from the same adapter.
    """
    bound = 1.0 / np.sqrt(inputs)
    draws = generator(digest("lora", seed, module)).uniform(-bound, bound, (rank, inputs))
    return draws.astype(np.float32)
