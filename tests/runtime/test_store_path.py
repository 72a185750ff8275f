"""Paths of every scheme that fsspec knows, with stores that need no network: memory, a folder, and a local web server."""

import functools
import http.server
import json
import threading
import time

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

import tiny
from dsee_jax import __main__ as commands
from dsee_jax.ckpt.resolve import resolve
from dsee_jax.errors import InputError
from dsee_jax.runtime import files, storage, store_path
from dsee_jax.runtime.store_path import StorePath
from merge.__main__ import main as merging
from merge.inputs import sources


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(storage.CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def memory():
    """The URL of an empty store."""
    system = fsspec.filesystem("memory")
    yield "memory://bucket"
    system.rm("/", recursive=True)


def bytes_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def folder(path, **contents):
    for name, text in contents.items():
        file = path / name.replace("__", "/").replace("_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return path


def test_path_is_written_read_and_listed(memory):
    path = storage.as_path(f"{memory}/a/b.txt/")
    assert (str(path), path.name, path.suffix, str(path.parent)) == (
        f"{memory}/a/b.txt",
        "b.txt",
        ".txt",
        f"{memory}/a",
    )
    assert path.parent.parent == path.parent.parent.parent == StorePath(memory)
    assert not path.exists()
    path.write_text("é")
    assert (path.read_text(), path.size(), path.is_file(), path.is_dir()) == ("é", 2, True, False)
    assert [*path.parent.iterdir()] == [*path.parent.glob("*.txt")] == [path]
    assert not [*path.parent.glob("*.json")]
    assert path.parent / "../c/./d" == StorePath(f"{memory}/c/d")
    assert path / "/tmp" == storage.as_path("/tmp")


def test_models_are_merged_and_compared_from_a_store_to_a_store(memory, tmp_path, capsys):
    """The bytes of the same merge on the local disk; nothing is left beside them."""
    for number, name in enumerate(("base", "a", "b")):
        storage.upload(tiny.bert(tmp_path / name, seed=number), f"{memory}/{name}")
    text = (
        "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 1}}\n- {model: b, parameters: {weight: 1}}\n"
    )
    storage.as_path(f"{memory}/recipe.yaml").write_text(text)
    (tmp_path / "recipe.yaml").write_text(text)
    for at in (memory, tmp_path):
        assert merging([f"{at}/recipe.yaml", f"{at}/out"]) == 0, capsys.readouterr().err
    made, expected = bytes_of(storage.download(f"{memory}/out")), bytes_of(tmp_path / "out")
    assert made.keys() == expected.keys()
    assert made["model.safetensors"] == expected["model.safetensors"]
    assert commands.main(["inspect", f"{memory}/base", f"{memory}/out", "--json", f"{memory}/found.json"]) == 0
    assert json.loads(storage.as_path(f"{memory}/found.json").read_text())["layers"]
    capsys.readouterr()
    for out, line in (
        (f"{memory}/out", f"{memory}/out exists"),
        (f"{memory}/a", "holds the input memory://bucket/a/"),
        (memory, "is a whole bucket"),
    ):
        assert merging([f"{memory}/recipe.yaml", out, *(["--overwrite"] if "holds" in line else [])]) == 2
        assert line in capsys.readouterr().err


def test_folder_is_replaced_completely(memory, tmp_path):
    """Also in a store with folders, where they must be made and must not be left."""
    for at in (memory, f"file://{tmp_path}/there"):
        storage.upload(folder(tmp_path / "one", config_json="1", old_txt="x"), f"{at}/out")
        with files.folder(f"{at}/out", replaces=["*", "*/*"]) as new:
            folder(new, config_json="2", sub__new_txt="y")
        assert bytes_of(storage.download(f"{at}/out")) == {"config.json": b"2", "sub/new.txt": b"y"}
        assert [path.name for path in storage.as_path(at).iterdir()] == ["out"]


class Slow(LocalFileSystem):
    """A store of many connections, which records the files that it receives at once."""

    protocol = "slow"
    async_impl = True
    fails = ""
    now, most, ended = set(), 0, []

    def put_file(self, local, to, **options):
        del options
        name = to.rpartition("/")[2]
        self.now.add(name)
        type(self).most = max(self.most, len(self.now))
        time.sleep(0.02)
        self.now.discard(name)
        if name == self.fails:
            raise ConnectionError("no route")
        self.ended.append(name)


@pytest.fixture
def slow(monkeypatch):
    fsspec.register_implementation("slow", Slow, clobber=True)
    for name, value in {"most": 0, "ended": [], "now": set(), "fails": ""}.items():
        monkeypatch.setattr(Slow, name, value)
    return Slow


SHARDS = {f"s{number:02}_safetensors": "x" for number in range(5 * storage.UPLOADS)}


def test_files_are_uploaded_together_and_the_config_last(slow, tmp_path):
    source = folder(tmp_path / "model", config_json="{}", a_index_json="{}", **SHARDS)
    storage.upload(source, f"slow://{tmp_path}/there")
    assert 2 <= slow.most <= storage.UPLOADS
    assert slow.ended[-2:] == ["a.index.json", "config.json"]
    assert len(slow.ended) == len(SHARDS) + 2


def test_first_error_names_the_file_and_stops_the_others(slow, tmp_path, monkeypatch):
    monkeypatch.setattr(slow, "fails", "s00.safetensors")
    source = folder(tmp_path / "model", config_json="{}", **SHARDS)
    with pytest.raises(
        storage.StoreError, match=r"/there/s00.safetensors cannot be reached \(ConnectionError: no route\)"
    ):
        storage.upload(source, f"slow://{tmp_path}/there")
    assert len(slow.ended) < 3 * storage.UPLOADS
    assert "config.json" not in slow.ended


@pytest.fixture
def web(tmp_path):
    """The URL of a server of the files in ``tmp_path``."""
    pytest.importorskip("aiohttp")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *ignored):
            pass

    with http.server.ThreadingHTTPServer(("localhost", 0), functools.partial(Quiet, directory=tmp_path)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://localhost:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_web_is_for_reading_files(web, tmp_path):
    folder(tmp_path, notes_txt="hello")
    assert storage.download(f"{web}/notes.txt").read_text() == "hello"
    assert storage.as_path(f"{web}/notes.txt").read_text() == "hello"
    for call, line in (
        (lambda: storage.download(f"{web}/no.txt"), "there is nothing there"),
        (lambda: resolve(web + "/model"), "a web server lists no files; give the path of one file"),
        (lambda: storage.as_output(f"{web}/out"), "cannot be written: http:// is for reading"),
    ):
        with pytest.raises(InputError, match=line):
            call()


BAD = {
    "an unknown scheme": (
        "gss://x/y",
        r"gss:// is the scheme of no store \(did you mean '.+'\?\); expected a path of this",
    ),
    "no bucket": ("gs://", "gs:// names no place in the store; expected a path such as gs://BUCKET"),
    "dots": ("memory://a/../b", "is no plain path of a store"),
    "a chain": ("zip://a::memory://b.zip", "is no plain path of a store"),
}


@pytest.mark.parametrize("case", BAD)
def test_url_is_refused_in_one_line(case):
    url, line = BAD[case]
    with pytest.raises(InputError, match=line) as raised:
        storage.as_path(url)
    assert "\n" not in str(raised.value)


PACKAGES = {
    "gcsfs": ("Please install gcsfs to access Google Storage", "pip install 'dsee-jax[gs]'"),
    "adlfs": ("Install adlfs to access Azure", "pip install adlfs (Install adlfs to access Azure)"),
    "lakefs_spec": ("Please install lakefs-spec", "pip install lakefs-spec (Please install lakefs-spec)"),
    # The module is not named as the package that has it.
    "smbclient": ('SMB requires "smbprotocol" installed', 'SMB requires "smbprotocol" installed'),
}


@pytest.mark.parametrize("module", PACKAGES)
def test_missing_package_is_named(monkeypatch, module):
    advice, fix = PACKAGES[module]

    def missing(scheme):
        raise ImportError(advice) from ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    store_path._kind.cache_clear()
    with pytest.raises(InputError) as raised:
        storage.as_path("az://container/x")
    store_path._kind.cache_clear()
    assert str(raised.value) == f"az:// needs a package that is not installed: {fix}"


def test_output_on_the_hub_is_pushed():
    with pytest.raises(InputError, match="hf://me/model cannot be written: .* give --push REPO"):
        storage.as_output("hf://me/model")


def test_an_at_in_a_url_begins_a_revision(memory, tmp_path):
    """It may stand in the name of a folder, or before a host; a revision after a URL is said to be none."""
    storage.upload(tiny.bert(tmp_path / "a"), f"{memory}/a@b")
    assert sources.open_source(f"{memory}/a@b", tmp_path).config["model_type"] == "bert"
    assert sources.moved(f"{memory}/a@b+org/name@main", tmp_path, str) == f"{memory}/a@b+org/name@main"
    with pytest.raises(InputError, match=r"/a@v1 is not the folder .* has no revisions: leave out @v1"):
        sources.open_source(f"{memory}/a@v1", tmp_path)
