"""Paths of object stores, against local servers of their protocols: downloads, uploads, and complete runs."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pytest
from safetensors.numpy import load_file

import buckets
import jobs
import runs
import tiny
from dsee_jax import __main__ as commands
from dsee_jax import config as configs
from dsee_jax import tree
from dsee_jax.ckpt import hf, hf_save
from dsee_jax.ckpt.resolve import resolve
from dsee_jax.data import load
from dsee_jax.errors import InputError
from dsee_jax.runtime import files, preemption, storage, store_path
from dsee_jax.train import config_file, loop
from merge.__main__ import main as merging

pytestmark = [
    # s3fs and gcsfs close their connections at the end of the process only.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="session", params=["gs", "s3"])
def server(request, tmp_path_factory):
    """The scheme of a running store, which has one bucket."""
    scheme = request.param
    log = tmp_path_factory.mktemp(scheme) / "log"
    with buckets.opened(scheme, log) as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        if scheme == "s3":
            fsspec.filesystem("s3").mkdir(buckets.BUCKET)
        yield scheme


@pytest.fixture
def bucket(server, tmp_path, monkeypatch, request):
    """The URL of a folder for the test alone; downloads go to ``tmp_path / "cache"``."""
    monkeypatch.setenv(storage.CACHE, str(tmp_path / "cache"))
    name = "".join(c if c.isalnum() else "_" for c in request.node.name)
    return f"{server}://{buckets.BUCKET}/{name}"


GOOGLE = pytest.mark.parametrize("server", ["gs"], indirect=True, scope="session")
"""For Google's store only: Orbax supports no other."""


def bytes_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def equal(a, b):
    a, b = tree.flatten(a), tree.flatten(b)
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_model_is_read_from_a_store(bucket, tmp_path):
    """Equal params; only the files of a model are downloaded, once, and again after they change in the store."""
    base = tiny.bert(tmp_path / "base", shards=2)
    (base / "optimizer.pt").write_bytes(b"x")
    storage.upload(base, f"{bucket}/base")
    assert storage.listdir(f"{bucket}/base") == sorted(path.name for path in base.iterdir())
    _, params = hf.load_pretrained(f"{bucket}/base/")
    assert equal(params, hf.load_pretrained(base)[1])
    here = resolve(f"{bucket}/base")
    assert not (here / "optimizer.pt").exists()
    files = {path: path.stat().st_mtime_ns for path in here.iterdir() if path.is_file()}
    assert resolve(f"{bucket}/base") == here
    assert {path: path.stat().st_mtime_ns for path in here.iterdir() if path.is_file()} == files

    other = tiny.bert(tmp_path / "other", seed=1)
    storage.upload(other, f"{bucket}/base")
    assert equal(hf.load_pretrained(f"{bucket}/base")[1], hf.load_pretrained(other)[1])
    # A deleted file of the store would otherwise stay as a shard.
    assert sorted(path.name for path in here.glob("*.safetensors*")) == ["model.safetensors"]
    # A truncated copy is downloaded again.
    (here / "model.safetensors").write_bytes(b"short")
    assert equal(hf.load_pretrained(f"{bucket}/base")[1], hf.load_pretrained(other)[1])


def test_model_is_written_to_a_store(bucket, tmp_path):
    """The bytes of a local folder; an existing folder is replaced completely, and only with ``overwrite``."""
    model, params = hf.load_pretrained(base := tiny.bert(tmp_path / "base"))
    hf_save.save_pretrained(tmp_path / "here", model, params, source=base)
    hf_save.save_pretrained(f"{bucket}/there", model, params, source=base, max_shard_size="5KB")
    with pytest.raises(InputError, match=f"{bucket}/there exists"):
        hf_save.save_pretrained(f"{bucket}/there", model, params, source=base)
    hf_save.save_pretrained(f"{bucket}/there", model, params, source=base, overwrite=True)
    assert storage.listdir(f"{bucket}/there") == sorted(path.name for path in (tmp_path / "here").iterdir())
    assert bytes_of(storage.download(f"{bucket}/there")) == bytes_of(tmp_path / "here")


def broken(monkeypatch, scheme, *, after):
    """Let a store accept ``after`` more files, and fail afterwards."""
    system, left = store_path.system(scheme), iter([True] * after)
    original = system.put_file

    def put_file(*args, **options):
        if not next(left, False):
            raise ConnectionError("no route")
        return original(*args, **options)

    monkeypatch.setattr(system, "put_file", put_file)


def test_failed_upload_keeps_the_old_folder(bucket, tmp_path, monkeypatch):
    """A new folder replaces an old one after the upload of all files; config.json is uploaded last."""
    model, params = hf.load_pretrained(base := tiny.bert(tmp_path / "base"))
    hf_save.save_pretrained(tmp_path / "here", model, params, source=base, max_shard_size="5KB")
    with monkeypatch.context() as patched:
        broken(patched, bucket.partition(":")[0], after=len(bytes_of(tmp_path / "here")) - 1)
        with pytest.raises(storage.StoreError, match=f"{bucket}/new/config.json cannot be reached .*no route"):
            storage.upload(tmp_path / "here", f"{bucket}/new")
    assert "model.safetensors.index.json" in storage.listdir(f"{bucket}/new")
    with pytest.raises(InputError, match="not the folder of a model: it has no config.json"):
        resolve(f"{bucket}/new")
    storage.upload(base, f"{bucket}/old")
    with monkeypatch.context() as patched:
        broken(patched, bucket.partition(":")[0], after=2)
        with pytest.raises(storage.StoreError, match="no route"):
            hf_save.save_pretrained(f"{bucket}/old", model, params, source=base, overwrite=True)
    assert bytes_of(storage.download(f"{bucket}/old")) == bytes_of(base)
    with pytest.raises(storage.StoreError, match="is a whole bucket: name a folder in it"):
        storage.upload(base, bucket.rpartition("/")[0])
    assert bytes_of(storage.download(f"{bucket}/old")) == bytes_of(base)


def test_concurrent_downloads_copy_once(bucket, tmp_path, monkeypatch):
    """The other callers wait for the first, as the processes of one host do."""
    storage.upload(tiny.bert(tmp_path / "base"), f"{bucket}/base")
    system, copied = store_path.system(bucket.partition(":")[0]), []
    original = system.get_file

    def get_file(key, *rest, **options):
        copied.append(key)
        time.sleep(0.1)
        return original(key, *rest, **options)

    monkeypatch.setattr(system, "get_file", get_file)
    with ThreadPoolExecutor(3) as pool:
        places = list(pool.map(storage.download, [f"{bucket}/base"] * 3))
    assert len(copied) == len(set(copied)) == len(bytes_of(tmp_path / "base"))
    assert bytes_of(places[0]) == bytes_of(tmp_path / "base")


def test_objects_that_are_not_files_are_skipped(bucket, tmp_path):
    """Folder markers of a web console, and names that lead out of the folder."""
    system, key = store_path.system(bucket.partition(":")[0]), bucket.partition("://")[2]
    storage.upload(tiny.bert(tmp_path / "base"), f"{bucket}/base")
    system.pipe_file(f"{key}/base/", b"")
    system.pipe_file(f"{key}/base/model/", b"")
    assert bytes_of(storage.download(f"{bucket}/base")) == bytes_of(tmp_path / "base")
    assert storage.listdir(f"{bucket}/base") == sorted(path.name for path in (tmp_path / "base").iterdir())
    if bucket.startswith("s3"):  # Google's emulator refuses the name
        system.pipe_file(f"{key}/base/a/../../../evil.txt", b"x")
        storage.download(f"{bucket}/base")
        assert not [*tmp_path.rglob("evil.txt")]


def test_merge_from_a_store_to_a_store(bucket, tmp_path, capsys):
    """Recipe, models beside the recipe and at full paths, and output: the bytes of the same merge on the local disk."""
    for number, name in enumerate(("base", "a", "b")):
        tiny.bert(tmp_path / name, seed=number)
        storage.upload(tmp_path / name, f"{bucket}/{name}")
    for where, at in ((tmp_path, "."), (bucket, bucket)):
        text = f"merge_method: rankmean\nbase_model: {at}/base\nmodels:\n- model: a\n- model: {at}/b\n"
        (tmp_path / "recipe.yaml").write_text(text)
        if where is bucket:
            storage.upload(tmp_path / "recipe.yaml", f"{bucket}/recipe.yaml")
        assert merging([f"{where}/recipe.yaml", f"{where}/out"]) == 0, capsys.readouterr().err
    made = load_file(storage.download(f"{bucket}/out") / "model.safetensors")
    assert equal(made, load_file(tmp_path / "out" / "model.safetensors"))
    assert storage.listdir(f"{bucket}/out") == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert not list((tmp_path / "cache" / "unfinished").glob("[!.]*"))
    assert merging([f"{bucket}/recipe.yaml", f"{bucket}/out"]) == 2
    assert f"{bucket}/out exists" in capsys.readouterr().err
    notes = storage.as_path(f"{bucket}/out/notes.txt")
    notes.write_text("x")
    assert merging([f"{bucket}/recipe.yaml", f"{bucket}/out", "--overwrite"]) == 2
    assert "'notes.txt' in it is not a file that this command writes" in capsys.readouterr().err
    notes.system.rm_file(notes.key)
    assert merging([f"{bucket}/recipe.yaml", f"{bucket}/out", "--overwrite"]) == 0
    for where, said in (
        (bucket, f"{bucket} holds the input {bucket}/"),
        (f"{bucket}/a", f"holds the input {bucket}/a/"),
    ):
        assert merging([f"{bucket}/recipe.yaml", where, "--overwrite"]) == 2
        assert said in capsys.readouterr().err
    assert commands.main(["inspect", f"{bucket}/base", f"{bucket}/out", "--json", f"{bucket}/found.json"]) == 0
    assert json.loads(storage.as_path(f"{bucket}/found.json").read_text())["layers"]


def test_merge_resumes_with_the_upload(bucket, tmp_path, capsys, monkeypatch):
    for number, name in enumerate(("base", "a", "b")):
        tiny.bert(tmp_path / name, seed=number)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("merge_method: rankmean\nbase_model: base\nmodels:\n- model: a\n- model: b\n")
    with monkeypatch.context() as patched:
        broken(patched, bucket.partition(":")[0], after=1)
        assert merging([str(recipe), f"{bucket}/out"]) == 1
        assert "no route" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        patched.setattr("merge.streaming.engine.run", None)
        assert merging([str(recipe), f"{bucket}/out"]) == 0, capsys.readouterr().err
    assert merging([str(recipe), str(tmp_path / "here")]) == 0
    assert (
        bytes_of(storage.download(f"{bucket}/out"))["model.safetensors"]
        == bytes_of(tmp_path / "here")["model.safetensors"]
    )
    assert not list((tmp_path / "cache" / "unfinished").glob("[!.]*"))


@pytest.mark.slow
@GOOGLE
def test_run_in_a_store(bucket, tmp_path, monkeypatch, capsys):
    """Config, model, data and run in a store, interrupted and resumed: the figures of a run on the local disk."""
    keys = runs.settings(tmp_path, train__eval_every=3)
    expected = loop.run(
        config_file.read(None, [f"{k}={json.dumps(v)}" for k, v in keys.items()]), say=lambda text: None
    )
    for name in ("base", "data"):
        storage.upload(tmp_path / name, f"{bucket}/{name}")
    there = keys | {"model.path": f"{bucket}/base", "data.dir": f"{bucket}/data", "output_dir": f"{bucket}/run"}
    config = config_file.read(None, [f"{k}={json.dumps(v)}" for k, v in there.items()])
    (tmp_path / "run.yaml").write_text(config_file.dump(config))
    storage.upload(tmp_path / "run.yaml", f"{bucket}/run.yaml")
    config = config_file.read(f"{bucket}/run.yaml")

    asked = iter([False] * 7 + [True])
    with monkeypatch.context() as patched:
        patched.setattr(preemption, "asked", lambda *ignored: next(asked))
        with pytest.raises(preemption.Preempted, match="step 8 of 10 of stage tune"):
            loop.run(config, say=lambda text: None)
    said = []
    figures = loop.run(config, say=said.append)
    assert any("resuming at step 8 of stage tune" in str(text) for text in said)
    for name in ("final", "stages", "before", "weight_sparsity", "model_bytes"):
        assert figures[name] == expected[name]
    records = [files.read(storage.as_path(f"{at}/run/metrics.jsonl")) for at in (bucket, tmp_path)]
    # The interrupted run has one more record of a step.
    scored = [[r for r in one if "metrics" in r] for one in records]
    assert scored[0] == scored[1]
    weights = [
        load_file(storage.download(f"{at}/run") / "model" / "model.safetensors") for at in (bucket, str(tmp_path))
    ]
    assert equal(*weights)
    assert not (tmp_path / "cache/gs" / bucket.removeprefix("gs://") / "run/checkpoints").exists()

    capsys.readouterr()
    assert commands.main(["evaluate", f"{bucket}/run"]) == 0
    assert json.loads(capsys.readouterr().out) == pytest.approx(expected["final"], rel=1e-5)
    assert commands.main(["export", f"{bucket}/run", f"{bucket}/exported"]) == 0
    assert "config.json" in storage.listdir(f"{bucket}/exported")
    assert commands.main(["export", f"{bucket}/run", f"{bucket}/exported"]) == 2
    assert f"{bucket}/exported exists" in capsys.readouterr().err
    arguments = ["--kind", "fisher", "--examples", "8"]
    assert commands.main(["statistics", f"{bucket}/run", f"{bucket}/f.safetensors", *arguments]) == 0
    assert load_file(storage.download(f"{bucket}/f.safetensors"))
    assert commands.main(["report", f"{bucket}/run"]) == 0
    assert f"{bucket}/run/curves.png" in capsys.readouterr().out
    assert "curves.png" in storage.listdir(f"{bucket}/run")


@pytest.mark.exhaustive
@GOOGLE
def test_job_of_two_processes_in_a_store(bucket, tmp_path):
    """Both processes write one checkpoint; process 0 alone writes the other files."""
    keys = runs.settings(tmp_path, train__eval_every=3)
    for name in ("base", "data"):
        storage.upload(tmp_path / name, f"{bucket}/{name}")
    (tmp_path / "run.yaml").write_text("")
    there = {"model.path": f"{bucket}/base", "data.dir": f"{bucket}/data"}
    for where, count in ((f"{bucket}/run", 2), (str(tmp_path / "run"), 1)):
        flags = [f"--{k}={json.dumps(v)}" for k, v in (keys | there | {"output_dir": where}).items()]
        flags += ["--mesh.fsdp=2"] if count == 2 else []
        for status, _, error in jobs.run(count, tmp_path / "run.yaml", *flags):
            assert status == 0, error
    two, one = (json.loads(storage.as_path(f"{at}/run/metrics.json").read_text()) for at in (bucket, tmp_path))
    assert two["final"] == pytest.approx(one["final"], rel=1e-4)


def test_log_in_a_store_is_not_written_at_every_line(bucket, monkeypatch):
    """A store cannot append; lines are written after `EVERY` seconds, before a read, and by `flush`."""
    path = storage.as_path(f"{bucket}/metrics.jsonl")
    written = []
    monkeypatch.setattr(type(path), "write_text", lambda self, text: written.append(text))
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for number in range(5):
        files.append(path, {"step": number})
    assert not written
    now += files.EVERY
    files.append(path, {"step": 5})
    files.append(path, {"step": 6})
    files.flush(path)
    files.flush(path)
    assert [text.count("\n") for text in written] == [6, 7]

    def fail(self, text):
        raise ConnectionError("no route")

    # `append` tolerates a failure; `flush` raises it.
    monkeypatch.setattr(type(path), "write_text", fail)
    now += files.EVERY
    files.append(path, {"step": 7})
    with pytest.raises(storage.StoreError, match="no route"):
        files.flush(path)
    monkeypatch.setattr(type(path), "write_text", lambda self, text: written.append(text))
    files.flush(path)
    assert written[-1].count("\n") == 8
    monkeypatch.undo()


def bad(folder, case):
    """Prepare a case; return the failing call."""
    match case:
        case "nothing there":
            return lambda: storage.download(f"{folder}/none")
        case "no bucket":
            return lambda: storage.download(f"{folder.partition('://')[0]}://nosuchbucket/folder")
        case "no model":
            storage.as_path(f"{folder}/readme.txt").write_text("x")
            return lambda: resolve(folder)
        case "a pickle":
            for name in ("config.json", "pytorch_model.bin"):
                storage.as_path(f"{folder}/{name}").write_text("{}")
            return lambda: resolve(folder)
        case "no config":
            return lambda: config_file.read(f"{folder}/none.yaml")
        case "no YAML":
            storage.as_path(f"{folder}/run.yaml").write_text("{")
            return lambda: config_file.read(f"{folder}/run.yaml")
        case "a revision":
            return lambda: resolve(folder, "v1")
        case "no data":
            return lambda: load(configs.DataConfig(source="csv", dir=f"{folder}/none", text="text"), seed=0)
        case "no text":
            for name in ("train.csv", "dev.csv"):
                with storage.as_path(f"{folder}/{name}").open("wb") as file:
                    file.write("text,label\n\xe9,1\n".encode("latin-1"))
            return lambda: load(configs.DataConfig(source="csv", dir=folder, text="text"), seed=0)


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("nothing there", "/none: there is nothing there"),
        ("no bucket", "nosuchbucket/folder"),
        ("no model", "is not the folder of a model: it has no config.json, but readme.txt"),
        ("a pickle", "/pytorch_model.bin is a pickle"),
        ("no config", "/none.yaml"),
        ("no YAML", "/run.yaml: not YAML"),
        ("a revision", "@v1: a folder of a store has no revisions"),
        ("no data", "data.dir: no folder"),
        ("no text", "/train.csv:2: not UTF-8 text"),
    ],
)
def test_bad_input_is_one_line(bucket, case, text):
    call = bad(bucket, case)
    with pytest.raises(InputError, match=text) as raised:
        call()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("scheme", ["s3", "memory"])
def test_run_in_a_store_that_orbax_does_not_support_is_refused(tmp_path, scheme):
    """One line, before any work."""
    keys = runs.settings(tmp_path, output_dir=f"{scheme}://b/x")
    config = config_file.read(None, [f"{k}={json.dumps(v)}" for k, v in keys.items()])
    with pytest.raises(InputError, match=f"output_dir {scheme}://b/x: Orbax"):
        loop.run(config)


def test_path_without_a_scheme_is_of_this_machine():
    assert storage.as_path("~").is_dir()
    assert os.fspath(storage.as_path("a/b")) == "a/b"
