"""The state of every random number generator of a process: captured, put back, or derived for other ranks."""

import hashlib
import random
from typing import Any

import numpy as np
import torch


def capture_rng(device: torch.device) -> dict[str, Any]:
    """Read the generators of Python, numpy and torch, and that of a CUDA device if CUDA is in use.

    Args:
        device: of this process.

    Returns:
        Plain numbers and tensors, which a checkpoint that is read safely can hold.
    """
    version, words, gauss = random.getstate()
    numpy_state: dict[str, Any] = np.random.get_state(legacy=False)
    state: dict[str, Any] = {
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "torch": torch.get_rng_state(),
    }
    if numpy_state["bit_generator"] == "MT19937":
        state["numpy"] = {
            "key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
            "position": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_rng(state: dict[str, Any], device: torch.device) -> None:
    """Put captured states back.

    Args:
        state: what `capture_rng` gave; a generator that it does not hold is left as it is.
        device: of this process.
    """
    python = state["python"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    if (saved := state.get("numpy")) is not None:
        key = saved["key"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", key, saved["position"], saved["has_gauss"], saved["gauss"]))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def derive_rng(states: list[dict[str, Any]], rank: int, num_ranks: int) -> None:
    """Seed the generators of a rank that no saved state belongs to, the same way each time.

    The seed is the first 8 bytes of SHA-256 over torch's saved states in rank order, the rank and the number of ranks.

    Args:
        states: of all ranks that saved.
        rank: of this process now.
        num_ranks: now.
    """
    digest = hashlib.sha256()
    for state in states:
        digest.update(state["torch"].numpy().tobytes())
    digest.update(f"{rank} of {num_ranks}".encode())
    seed = int.from_bytes(digest.digest()[:8], "big")
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed % 2**63)
