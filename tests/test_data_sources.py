"""What a path stands for, how files become documents, and what is said when they cannot."""

import io
import json
import re
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sat_lightning.data import formats, sources
from sat_lightning.data.sources import SourceOptions, Unfinished, open_source, register_source
from sat_lightning.errors import DataError


def read(path: str | list[str], **options: str) -> list[bytes | str]:
    return [np.array(d) if isinstance(d, np.ndarray) else d for d in open_source(path, SourceOptions(**options))]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry to add to, put back afterwards."""
    monkeypatch.setattr(sources, "_BUILDERS", dict(sources._BUILDERS))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("z.txt", "b/a.md", "b/c.py", ".hidden/no.txt", ".no.txt"):
        (tmp_path / name).write_text(name)
    return tmp_path


def test_file_folder_glob_and_list(tree: Path) -> None:
    assert read(str(tree / "z.txt")) == [b"z.txt"]
    assert read(str(tree)) == [b"b/a.md", b"b/c.py", b"z.txt"]
    assert read(str(tree / "**" / "*.py")) == [b"b/c.py"]
    assert read([str(tree / "z.txt"), str(tree / "b")]) == [b"z.txt", b"b/a.md", b"b/c.py"]


def test_binary_file_is_refused_by_name_and_left_out_of_a_folder(tree: Path) -> None:
    (tree / "picture.dat").write_bytes(b"\x89PNG\0\0")
    with pytest.raises(DataError, match=r"picture\.dat is not UTF-8 text: NUL byte at 4\. Convert it \(iconv"):
        read(str(tree / "picture.dat"))
    with pytest.warns(UserWarning, match=r"1 of 4 files are not text and were left out, for instance picture\.dat"):
        assert len(read(str(tree))) == 3


@pytest.mark.parametrize("text", ["line of text\n" * 50, "ä€🙂" * 90, "x" * 640, "\n" * 300, "a\n" + "é" * 300])
@pytest.mark.parametrize("piece_size", [64, 65, 67])
def test_large_text_comes_in_pieces_cut_between_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, piece_size: int
) -> None:
    monkeypatch.setattr(formats, "_PIECE_SIZE", piece_size)
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    pieces = read(str(tmp_path / "long.txt"))
    assert len(pieces) > 3
    assert "".join(piece.decode() for piece in pieces) == text
    assert all(isinstance(piece, Unfinished) for piece in pieces[:-1])
    assert pieces[-1] and not isinstance(pieces[-1], Unfinished)


def test_jsonl_gives_the_text_field(tmp_path: Path) -> None:
    rows = [{"text": "one\ntwo", "body": "b1"}, {"text": "ü", "body": "b2"}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    assert read(str(tmp_path / "a.jsonl")) == ["one\ntwo", "ü"]
    assert read(str(tmp_path / "a.jsonl"), text_field="body") == ["b1", "b2"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"text": "cut',
            r"a\.jsonl, line 2: not valid JSON \(Unterminated string .* at column 10\)\. Mend or remove the line",
        ),
        ('{"texts": "x", "id": 1}', r"line 2: no field 'text'; fields there: id, texts\. Did you mean 'texts'\?"),
        ('["x"]', r"line 2: a JSON list, not an object with fields\. Mend or remove the line"),
        ('{"text": 5}', r"line 2: field 'text' holds int, not text"),
    ],
)
def test_bad_jsonl_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        read(str(tmp_path / "a.jsonl"))


def test_token_files_are_memory_maps(tmp_path: Path) -> None:
    ids = np.array([5, 70000 % 65536, 9], dtype=np.uint16)
    ids.tofile(tmp_path / "a.bin")
    np.save(tmp_path / "b.npy", np.array([1, 70000], dtype=np.uint32))
    for path, expected in (("a.bin", ids.tolist()), ("b.npy", [1, 70000])):
        (tokens,) = open_source(str(tmp_path / path))
        assert isinstance(tokens, np.memmap) and tokens.tolist() == expected


def test_bad_token_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"123")
    with pytest.raises(DataError, match=r"a\.bin: 3 bytes are not a whole number of uint16 token ids.*truncated"):
        read(str(tmp_path / "a.bin"))
    with pytest.raises(DataError, match=r"token_dtype is 'int7'; a \.bin token file holds 'uint16' or 'uint32'"):
        read(str(tmp_path / "a.bin"), token_dtype="int7")
    np.save(tmp_path / "b.npy", np.zeros((2, 2), dtype=np.float32))
    with pytest.raises(DataError, match=r"b\.npy: a float32 array of shape \(2, 2\); token ids are one dimension"):
        read(str(tmp_path / "b.npy"))
    content = (tmp_path / "b.npy").read_bytes()
    (tmp_path / "b.npy").write_bytes(content[:-3])
    with pytest.raises(DataError, match=r"b\.npy: not a whole NumPy array file"):
        read(str(tmp_path / "b.npy"))


def test_standard_library_without_tests_in_a_fixed_order() -> None:
    source = open_source("stdlib://")
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [file.relative_to(root).as_posix() for file in source.files]
    assert names == sorted(names, key=lambda name: name.split("/")) and len(names) > 300
    assert "argparse.py" in names and "json/decoder.py" in names
    parts = {part for name in names for part in name.split("/")}
    assert parts.isdisjoint({"test", "tests", "site-packages", "__pycache__"})
    assert source.num_bytes > 5_000_000
    assert next(iter(open_source("stdlib://json"))) == (root / "json" / "__init__.py").read_bytes()
    assert read("stdlib://abc.py") == [(root / "abc.py").read_bytes()]
    with pytest.raises(DataError, match=r"'stdlib://jsn': no \.py files under .*Use stdlib:// for all"):
        open_source("stdlib://jsn")


def test_own_source_by_extension_and_scheme(tmp_path: Path, registry: None) -> None:
    @register_source(".rev")
    def read_reversed(path: str, options: SourceOptions) -> Iterator[str]:
        yield Path(path).read_text()[::-1]

    @register_source("count://")
    def count(path: str, options: SourceOptions) -> Iterator[str]:
        yield from (f"{number}" for number in range(int(path)))

    (tmp_path / "a.rev").write_text("abc")
    assert read([str(tmp_path / "a.rev"), "count://3"]) == ["cba", "0", "1", "2"]
    source = open_source("count://2")
    assert list(source) == list(source) == ["0", "1"]
    assert source.fingerprint() != open_source("count://3").fingerprint()


def test_registration_refuses_what_it_cannot_tell_apart(registry: None) -> None:
    with pytest.raises(DataError, match=r"'csv' is neither an extension \('\.ext'\) nor a scheme"):
        register_source("csv")(lambda path, options: [])
    with pytest.raises(DataError, match=r"'\.jsonl' is taken by read_jsonl\. Choose another"):
        register_source(".jsonl")(lambda path, options: [])


def test_missing_path_says_what_lies_near(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("x")
    message = (
        f"data path '{tmp_path}/corpsu.txt' does not exist: looked for {tmp_path}/corpsu.txt. "
        f"Nearest names in {tmp_path}: corpus.txt. Give an existing file, folder or glob, or stdlib://"
    )
    with pytest.raises(DataError, match=re.escape(message)):
        open_source(f"{tmp_path}/corpsu.txt")
    with pytest.raises(DataError, match=re.escape(f"{tmp_path} holds nothing named like it")):
        open_source(f"{tmp_path}/QQQ/deeper/x")
    with pytest.raises(DataError, match=r"no file matches .*/\*\.md \('\*\*' enters folders"):
        open_source(f"{tmp_path}/*.md")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"the folder .*/empty holds no files"):
        open_source(f"{tmp_path}/empty")
    with pytest.raises(DataError, match="data path is empty. Give a file, folder or glob"):
        open_source("")
    with pytest.raises(DataError, match="data path is an empty list"):
        open_source([])
    with pytest.raises(DataError, match=r"registered for 'stdlb://'.*Did you mean 'stdlib://'\?.*@register_source"):
        open_source("stdlb://json")


def test_fingerprint_follows_names_sizes_times_and_options(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}')
    first = open_source(str(file)).fingerprint()
    assert open_source(str(file)).fingerprint() == first
    assert open_source(str(file), SourceOptions(text_field="b")).fingerprint() != first
    file.write_text('{"text": "ab"}')
    assert open_source(str(file)).fingerprint() != first


def test_documents_behind_urls_and_braces(tmp_path, sat_home):
    for number in range(3):
        with tarfile.open(tmp_path / f"part-{number}.tar", "w") as tar:
            text = f"document {number}".encode()
            member = tarfile.TarInfo(f"{number}.txt")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    options = SourceOptions(text_field="txt")
    local = open_source(str(tmp_path / "part-{0..2}.tar"), options)
    remote = open_source(f"file://{tmp_path}/part-{{0..1}}.tar", options)
    starred = open_source(f"file://{tmp_path}/part-*.tar", options)
    assert list(local) == list(starred) == ["document 0", "document 1", "document 2"]
    assert list(remote) == ["document 0", "document 1"]
    before = remote.fingerprint()
    (tmp_path / "part-1.tar").write_bytes((tmp_path / "part-2.tar").read_bytes() + b"\0" * 512)
    again = open_source(f"file://{tmp_path}/part-{{0..1}}.tar", options)
    assert again.fingerprint() != before
    assert list(again) == ["document 0", "document 2"], "a changed file is copied anew"
    with pytest.raises(DataError, match="no-such.tar' cannot be read"):
        list(open_source(f"file://{tmp_path}/no-such.tar", options))
    (tmp_path / "odd{1,2}.txt").write_text("braces in a name")
    assert read(str(tmp_path / "odd{1,2}.txt")) == [b"braces in a name"]
