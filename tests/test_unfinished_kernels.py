"""A linker that was stopped: what it left is dropped before anything is compiled, and nothing else is."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._inductor import codecache
from torch._inductor.codecache import CppCodeCache
from torch._inductor.cpp_builder import CppBuilder
from torch._inductor.cpu_vec_isa import invalid_vec_isa

from sat_lightning.generation.runner import compiled_forward
from sat_lightning.model.unfinished_kernels import drop_unfinished_kernels
from tests.training_examples import make_task


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path


def put(cache: Path, name: str, content: bytes = b"", mode: int = 0o644) -> Path:
    path = cache / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_only_what_no_linker_finished_goes(cache):
    unfinished = {put(cache, "aa/caa.main.so"), put(cache, "bb/cbb.so", b"half"), put(cache, "cc/ccc.so", mode=0o755)}
    put(cache, "dd/cdd.main.so", b"whole", 0o755)
    put(cache, "dd/cdd.main.cpp")
    put(cache, "triton/0/KEY/launcher.so", b"whole, and not made by a linker in this place")
    kept = {path for path in cache.rglob("*") if path.is_file()} - unfinished
    assert set(drop_unfinished_kernels()) == unfinished
    assert all(path.exists() for path in kept) and not any(path.exists() for path in unfinished)
    assert drop_unfinished_kernels() == []


def test_what_another_process_is_building_stays(cache):
    library = put(cache, "aa/caa.main.so")
    holder = "import filelock, sys\nwith filelock.FileLock(sys.argv[1]): print(flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", holder, str(put(cache, "locks/caa.lock"))]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert drop_unfinished_kernels() == []
        process.stdin.close()
    assert drop_unfinished_kernels() == [library]


def test_the_code_generator_takes_an_empty_library_for_whole_until_it_is_dropped(cache, monkeypatch):
    """With the compiler itself, since where it keeps libraries and locks is its own affair."""

    def answer():
        CppCodeCache.cache_clear()
        return CppCodeCache.load('extern "C" int answer() { return 42; }').answer()

    monkeypatch.setattr(codecache, "pick_vec_isa", lambda: invalid_vec_isa)  # which it tries out by compiling, long
    with torch._inductor.config.patch(cpp_cache_precompile_headers=False):
        with monkeypatch.context() as stopped:
            stopped.setattr(CppBuilder, "build", lambda self: Path(self.get_target_file_path()).touch())
            with pytest.raises(OSError, match="file too short"):
                answer()
        with pytest.raises(OSError, match="file too short"):
            answer()
        (library,) = drop_unfinished_kernels()
        assert (cache / "locks" / f"{library.name.partition('.')[0]}.lock").exists()
        assert answer() == 42
        assert library.exists() and drop_unfinished_kernels() == []


@pytest.mark.parametrize(
    ("options", "is_dropped"), [(True, True), ({"dynamic": True}, True), ({"backend": "eager"}, False)]
)
def test_training_that_is_compiled_begins_by_it(cache, options, is_dropped):
    library = put(cache, "aa/caa.main.so")
    make_task(compile=options).configure_model()
    assert library.exists() != is_dropped


def test_writing_that_is_compiled_begins_by_it(cache):
    library = put(cache, "aa/caa.main.so")
    compiled_forward.__wrapped__("eager")
    assert library.exists()
    compiled_forward.__wrapped__("inductor")
    assert not library.exists()
