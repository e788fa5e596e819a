"""What a compiler that was stopped leaves behind, and how a later run gets past it."""

from __future__ import annotations

import stat
from contextlib import suppress
from pathlib import Path


def drop_unfinished_kernels() -> list[Path]:
    """Remove the libraries whose linker was stopped from the cache of PyTorch's code generator.

    For a CPU a linker writes them right where the next process looks, and what stands there is taken for whole: after
    a signal in that second every run of the user on this machine that needs the same kernel would end with "file too
    short" (pytorch/pytorch#102539, #180841). What another process is building now stays.

    Returns:
        The files that were removed; the code generator makes them anew.
    """
    from filelock import FileLock  # what only a compiler needs is not loaded before one

    try:
        from torch._inductor.runtime.cache_dir_utils import cache_dir
    except ImportError:  # PyTorch does not promise that it stays there
        return []
    folder, dropped = Path(cache_dir()), []
    for library in folder.glob("??/*.so"):
        # Locked, gone or another user's; the last on file systems that have no locks.
        with suppress(OSError, NotImplementedError):
            if _is_unfinished(library):
                with FileLock(folder / "locks" / f"{library.name.partition('.')[0]}.lock", timeout=0):
                    if _is_unfinished(library):
                        library.unlink()
                        dropped.append(library)
    return dropped


def _is_unfinished(library: Path) -> bool:
    """Whether a linker still had to write; that it may be executed is the last thing that it says of a file."""
    found = library.stat()
    return found.st_size == 0 or not found.st_mode & stat.S_IXUSR
