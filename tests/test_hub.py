"""Names, URLs and downloads, against a real server that breaks off, ignores Range, lies or sends what it should not."""

import hashlib
import io
import json
import os
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from sat_lightning import AutoModel, TransformerConfig
from sat_lightning.checkpoint import download as downloads
from sat_lightning.checkpoint import hub, known_models, sat_home, save_sat
from sat_lightning.errors import CheckpointError
from sat_lightning.models import GPT2Model

TINY = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, vocab_size=50, max_sequence_length=16)


class Server(ThreadingHTTPServer):
    """Serves `files`; `behaviour` of a path is a set of words."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)  # the system chooses the port
        self.files, self.behaviour, self.requests = {}, {}, []
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, path = self.server, self.path.partition("?")[0]
        behaviour = server.behaviour.get(path, set())
        wanted = self.headers.get("Range")
        server.requests.append((path, wanted))
        if path not in server.files:
            self.send_error(404)
            return
        if "busy once" in behaviour:
            behaviour.discard("busy once")
            self.send_error(503)
            return
        content, start = server.files[path], 0
        etag = f'"{hashlib.sha256(content).hexdigest()[:8]}"'
        if wanted and "ignores range" not in behaviour and self.headers.get("If-Range") == etag:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if "no etag" not in behaviour:
            self.send_header("ETag", etag)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        sent = content[start:]
        if "drops" in behaviour or "drops once" in behaviour:
            behaviour.discard("drops once")
            sent = sent[: max(len(sent) // 2, 1)]
            self.close_connection = True
        self.wfile.write(sent)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    for name in ("SAT_MIRROR", "SAT_OFFLINE", "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("SAT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(downloads, "FIRST_PAUSE", 0.0)
    monkeypatch.setattr(downloads, "_BLOCK_SIZE", 4096)
    return tmp_path / "home"


@pytest.fixture
def model(tmp_path):
    model = GPT2Model(TINY).eval()
    save_sat(model, tmp_path / "made" / "tiny-gpt")
    return model


def zip_of(folder, prefix=""):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, prefix + file.relative_to(folder).as_posix())
    return buffer.getvalue()


@pytest.fixture
def served(server, model, tmp_path):
    server.files["/tiny-gpt.zip"] = zip_of(tmp_path / "made" / "tiny-gpt", "tiny-gpt/")
    return server


def assert_loaded(again, model):
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def left(home):
    """Everything in the home but locks."""
    return sorted(p.relative_to(home).as_posix() for p in home.iterdir() if p.name != ".locks") if home.exists() else []


def test_a_name_a_url_and_a_mirror_are_fetched_once(served, model, home, monkeypatch):
    url = f"{served.address}/tiny-gpt.zip"
    assert_loaded(AutoModel.from_pretrained("tiny-gpt", url=url), model)
    assert_loaded(GPT2Model.from_pretrained("tiny-gpt"), model)  # it is there now
    assert len(served.requests) == 1 and left(home) == ["tiny-gpt"]
    assert_loaded(AutoModel.from_pretrained(url), model)
    assert_loaded(AutoModel.from_pretrained(url), model)
    assert len(served.requests) == 2 and [name for name in left(home) if name.startswith("tiny-gpt-")]
    served.files["/m/bert-base-uncased.zip"] = served.files["/tiny-gpt.zip"]
    monkeypatch.setenv("SAT_MIRROR", f"{served.address}/m/")
    assert_loaded(AutoModel.from_pretrained("bert-base-uncased"), model)


def test_models_json_adds_names_with_size_and_digest(served, model, home):
    content = served.files["/tiny-gpt.zip"]
    digest = hashlib.sha256(content).hexdigest()
    home.mkdir()
    entry = {"url": f"{served.address}/tiny-gpt.zip", "size": len(content), "sha256": digest.upper()}
    (home / "models.json").write_text(json.dumps({"mine": entry}))
    assert known_models()["mine"].size == len(content)
    assert_loaded(AutoModel.from_pretrained("mine"), model)
    for change, message in (
        ({"sha256": "0" * 64}, f"the SHA-256 is {digest}, {'0' * 64} is expected"),
        ({"size": 7}, f"{len(content)} bytes came, 7 are expected"),
    ):
        (home / "models.json").write_text(json.dumps({"wrong": entry | change}))
        with pytest.raises(CheckpointError, match=message):
            AutoModel.from_pretrained("wrong")
        assert left(home) == ["mine", "models.json"]
    (home / "models.json").write_text(json.dumps({"wrong": {"link": "x"}}))
    with pytest.raises(CheckpointError, match="models.json: 'wrong' must be"):
        AutoModel.from_pretrained("wrong")


@pytest.mark.parametrize("behaviour", ["drops once", "drops", "ignores range", "no etag", "busy once"])
def test_a_break_is_taken_up_where_it_was(served, model, home, behaviour):
    served.behaviour["/tiny-gpt.zip"] = {behaviour} if behaviour.endswith("once") or behaviour == "drops" else {
        behaviour, "drops once"
    }  # fmt: skip
    assert_loaded(AutoModel.from_pretrained("tiny-gpt", url=f"{served.address}/tiny-gpt.zip"), model)
    ranges = [wanted for _, wanted in served.requests]
    half = len(served.files["/tiny-gpt.zip"]) // 2
    if behaviour == "busy once":
        assert ranges == [None, None]
    elif behaviour == "no etag":
        assert ranges == [None, None], "without an ETag nobody knows that it is the same file"
    else:
        assert ranges[:2] == [None, f"bytes={half}-"]
    assert left(home) == ["tiny-gpt"]


def test_a_file_that_changed_meanwhile_is_not_glued_to_the_old_half(served, model, home):
    url = f"{served.address}/tiny-gpt.zip"
    home.mkdir()
    content = served.files["/tiny-gpt.zip"]
    (home / ".tiny-gpt.zip.part").write_bytes(content[:5000][::-1])
    (home / ".tiny-gpt.zip.etag").write_text('"of yesterday"')
    assert_loaded(AutoModel.from_pretrained("tiny-gpt", url=url), model)
    assert served.requests == [("/tiny-gpt.zip", "bytes=5000-")]


def test_a_server_that_gives_nothing_more_is_given_up_and_the_part_is_kept(served, model, home, monkeypatch):
    url = f"{served.address}/tiny-gpt.zip"
    home.mkdir()
    content = served.files["/tiny-gpt.zip"]
    (home / ".tiny-gpt.zip.part").write_bytes(content[:5000])
    (home / ".tiny-gpt.zip.etag").write_text(f'"{hashlib.sha256(content).hexdigest()[:8]}"')

    def break_off(*args):
        raise ConnectionResetError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(downloads, "_fetch", break_off)
        with pytest.raises(CheckpointError, match="gone, 5 times in a row. .* 5000 bytes are kept in .*gpt.zip.part"):
            AutoModel.from_pretrained("tiny-gpt", url=url)
    assert_loaded(AutoModel.from_pretrained("tiny-gpt", url=url), model)
    assert served.requests == [("/tiny-gpt.zip", "bytes=5000-")] and left(home) == ["tiny-gpt"]


def make_zip(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def link_zip():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        member = zipfile.ZipInfo("m/latest")
        member.external_attr = 0o120777 << 16
        archive.writestr(member, "../../secret")
    return buffer.getvalue()


BAD_ARCHIVES = {
    "climbs": (lambda: make_zip(**{"m/../../evil.txt": "x"}), "'m/../../evil.txt' lies outside"),
    "absolute": (lambda: make_zip(**{"/evil.txt": "x"}), "'/evil.txt' lies outside"),
    "backslash": (lambda: make_zip(**{"m\\..\\evil.txt": "x"}), "lies outside"),
    "link": (link_zip, "'m/latest' is a link"),
    "bomb": (lambda: make_zip(**{"m/zeros": b"\0" * (64 << 20)}), "would unpack to 67108864, more than 50 times"),
    "empty": (lambda: make_zip(), "is empty"),
    "no zip": (lambda: b"<html>Not found</html>", "is no whole zip file"),
    "half": (lambda: make_zip(**{"m/a": os.urandom(9000)})[:5000], "is no whole zip file"),
    "damaged": (lambda: make_zip(**{"m/a": "a" * 9000}).replace(b"m/a", b"m/b", 1), "is no whole zip file"),
}


@pytest.mark.parametrize("kind", BAD_ARCHIVES)
def test_bad_archives_are_refused_and_leave_nothing(server, home, tmp_path, kind):
    make, message = BAD_ARCHIVES[kind]
    server.files["/bad.zip"] = make()
    with pytest.raises(CheckpointError) as caught:
        AutoModel.from_pretrained("bad", url=f"{server.address}/bad.zip")
    assert message in str(caught.value).replace("\\\\", "\\")
    assert left(home) == [] and [p.name for p in tmp_path.iterdir()] == ["home"]


def test_a_malicious_pickle_in_an_archive_does_not_run(server, home, tmp_path, monkeypatch):
    class Runs:
        def __reduce__(self):
            return (os.system, ("echo run > ran.txt",))

    monkeypatch.chdir(tmp_path)
    save_sat(GPT2Model(TINY), tmp_path / "made")
    torch.save({"module": {"a": Runs()}}, tmp_path / "made" / "1" / "mp_rank_00_model_states.pt")
    server.files["/evil.zip"] = zip_of(tmp_path / "made", "evil/")
    with pytest.raises(CheckpointError, match="refused, as it asks for posix.system"):
        AutoModel.from_pretrained("evil", url=f"{server.address}/evil.zip")
    assert not (tmp_path / "ran.txt").exists()


def test_an_archive_without_a_folder_of_its_own_is_unpacked_into_one(server, model, tmp_path, home):
    server.files["/flat.zip"] = zip_of(tmp_path / "made" / "tiny-gpt")
    assert_loaded(AutoModel.from_pretrained("flat", url=f"{server.address}/flat.zip"), model)
    assert (home / "flat" / "latest").is_file()


def test_refusals_of_the_server_unknown_names_and_no_network(server, home, monkeypatch, tmp_path):
    with pytest.raises(CheckpointError, match=r"/none.zip: the server says 404 Not Found. Check the address"):
        AutoModel.from_pretrained("none", url=f"{server.address}/none.zip")
    assert left(home) == [] and len(server.requests) == 1
    with pytest.raises(CheckpointError, match="'bert-base-uncaset' is neither .* Did you mean 'bert-base-uncased'"):
        AutoModel.from_pretrained("bert-base-uncaset")
    with pytest.raises(CheckpointError, match="'llama-65b' is served from a private bucket only. Pass url="):
        AutoModel.from_pretrained("llama-65b")
    with pytest.raises(CheckpointError, match="cannot fetch 'ftp', only http, https and hf"):
        AutoModel.from_pretrained("ftp://example.org/x.zip")
    with pytest.raises(CheckpointError, match="hf://x is no address: write hf://organisation/name"):
        AutoModel.from_pretrained("hf://x")
    assert len(server.requests) == 1
    for name in ("SAT_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
        with pytest.raises(CheckpointError, match="'gpt2' is not in .*, and the network is off"):
            AutoModel.from_pretrained("gpt2")
        with pytest.raises(CheckpointError, match="hf://a/b is not in .* and the network is off"):
            AutoModel.from_pretrained("hf://a/b")
        monkeypatch.delenv(name)
    with pytest.raises(CheckpointError, match="the network is off"):
        AutoModel.from_pretrained("gpt2", offline=True)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be made .* Set SAT_HOME to a folder you own"):
        AutoModel.from_pretrained("gpt2", home=tmp_path / "file" / "home")


def test_the_home_is_an_argument_the_environment_or_sats_own(monkeypatch, tmp_path):
    assert sat_home("~/x") == sat_home().home() / "x"
    assert sat_home() == tmp_path / "home"
    monkeypatch.delenv("SAT_HOME")
    assert sat_home() == sat_home().home() / ".sat_models"


def test_hf_addresses_are_fetched_into_the_home_without_pickles_where_there_is_a_choice(monkeypatch, home):
    hub_library = pytest.importorskip("huggingface_hub")
    asked = []

    def list_files(self, repository, revision=None):
        return ["config.json", "model.safetensors", "pytorch_model.bin"]

    def snapshot(repository, *, revision, local_dir, allow_patterns):
        asked.append((repository, revision, allow_patterns))
        GPT2Model(TINY).save_pretrained(local_dir)

    monkeypatch.setattr(hub_library.HfApi, "list_repo_files", list_files)
    monkeypatch.setattr(hub_library, "snapshot_download", snapshot)
    assert type(AutoModel.from_pretrained("hf://org/tiny@v1.0")) is GPT2Model
    assert left(home / "hf") == ["org--tiny@v1.0"]
    assert asked[0][:2] == ("org/tiny", "v1.0") and "*.bin" not in asked[0][2] and "*.safetensors" in asked[0][2]

    def refuse(*args, **kwargs):
        raise OSError("401 Client Error")

    monkeypatch.setattr(hub_library, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=r"hf://org/other cannot be fetched \(OSError: 401 .* HF_TOKEN"):
        AutoModel.from_pretrained("hf://org/other")


def test_no_address_carries_a_secret():
    for name, known in known_models().items():
        assert known.url is None or known.url.startswith(("https://", "hf://")), name
        assert "@" not in (known.url or "").partition("?")[0]
    assert hub.known_models()["gpt2"].url.endswith("gpt2.zip&dl=1")
