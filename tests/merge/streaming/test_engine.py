"""`python -m merge` from files to files: the written files, and a complete output or none."""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

import checkpoints
import decoders
import merge
import tiny
from dsee_jax import tree
from dsee_jax.ckpt import hf, tensors
from merge import __main__ as command
from merge.methods import METHODS
from merge.streaming import engine, shards, tiles

WEIGHTED = {"weight": 0.6}


def run(*arguments):
    return command.main([str(argument) for argument in arguments])


def refused(capsys, *arguments):
    """Run a merge that fails; return its error, one line."""
    assert run(*arguments) == 2
    lines = capsys.readouterr().err.strip().split("\n")
    assert len(lines) == 1, lines
    return lines[0]


def contents(folder):
    """``{name: bytes}`` of every file in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def hidden_files(folder):
    """The names of the hidden files in a folder, without the lock of a merge, which stays."""
    return [path.name for path in folder.iterdir() if path.name.startswith(".") and path.suffix != ".lock"]


def test_linear_merge_of_files_is_the_mean(tmp_path, capsys):
    base, a, b = checkpoints.family(tmp_path)
    assert run(checkpoints.recipe(tmp_path, each=WEIGHTED), tmp_path / "out") == 0
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == base.keys()
    for name, tensor in merged.items():
        np.testing.assert_allclose(tensor, (a[name] + b[name]) / 2, rtol=1e-6, atol=1e-7)
    assert capsys.readouterr().out.split() == [str(tmp_path / "out")]
    assert not hidden_files(tmp_path)
    card, recipe = ((tmp_path / "out" / name).read_text() for name in ("README.md", "merge_recipe.yml"))
    for model in ("model_0", "model_1"):
        digest = hashlib.sha256((tmp_path / model / "model.safetensors").read_bytes()).hexdigest()
        assert digest in card
        assert digest in recipe


@pytest.mark.sampled(2)
@pytest.mark.smoke
@pytest.mark.parametrize("method", ["rankmean", "task_arithmetic", "ties", "dare_ties", "slerp", "model_stock", "sce"])
def test_streamed_merge_equals_in_memory_merge(tmp_path, method):
    """DARE too: equal names give equal random choices."""
    count = 1 if method == "slerp" else 2
    base, *models = checkpoints.family(tmp_path, models=count)
    definition = METHODS[method]
    each = {key: {"weight": 0.6, "density": 0.5}[key] for key in definition.each if key in ("weight", "density")}
    shared = {"t": 0.3} if method == "slerp" else {}
    path = checkpoints.recipe(tmp_path, method, models=count, each=each, parameters=shared)
    assert run(path, tmp_path / "out", "--max-shard-size", "4kB") == 0
    expected = merge.merge(base, models, method=method, **each, **shared)
    for name, merged in checkpoints.load(tmp_path / "out").items():
        np.testing.assert_allclose(merged, expected[name], rtol=1e-6, atol=1e-6, err_msg=name)


def write(folder, family, seed):
    """Write a checkpoint of a family; return its path and the task to load it for."""
    if family in tiny.FAMILIES:
        return tiny.bert(folder, seed=seed, model_type=family), "sequence-classification"
    return decoders.write(folder, seed=seed, **decoders.VARIANTS[family]), "causal-lm"


@pytest.mark.sampled(4)
@pytest.mark.parametrize("family", [*tiny.FAMILIES, "llama", "llama, tied", "mistral", "qwen2", "qwen3", "gpt2"])
@pytest.mark.parametrize("method", ["linear", "rankmean"])
def test_streamed_files_load_as_the_merged_params(tmp_path, family, method):
    """Also where a file stores several params in one tensor."""
    names = ("base", "model_0", "model_1")
    params = [hf.load_pretrained(*write(tmp_path / name, family, seed))[1] for seed, name in enumerate(names)]
    recipe = checkpoints.recipe(tmp_path, method, each=WEIGHTED if method == "linear" else {})
    assert run(recipe, tmp_path / "out", "--max-shard-size", "10kB") == 0
    base, *models = params
    options = {"weight": 0.6} if method == "linear" else {}
    expected = merge.merge(None if method == "linear" else base, models, method=method, **options)
    _, merged = hf.load_pretrained(tmp_path / "out", write(tmp_path / "again", family, 0)[1])
    for path, leaf in tree.flatten(merged).items():
        np.testing.assert_allclose(leaf, tree.get(expected, path), rtol=1e-5, atol=1e-6, err_msg=path)


def test_shards_match_their_index(tmp_path):
    """Shards hold every tensor once, stay within the maximum size, and are named in the index."""
    checkpoints.family(tmp_path, max_shard_size="3kB")
    path = checkpoints.recipe(tmp_path, each=WEIGHTED)
    assert run(path, tmp_path / "out", "--max-shard-size", "5kB") == 0
    assert run(path, tmp_path / "one") == 0
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    index = json.loads((tmp_path / "out" / tensors.INDEX).read_text())
    sharded = {}
    for file in files:
        part = load_file(file)
        assert sum(array.nbytes for array in part.values()) <= 5000
        assert all(index["weight_map"][name] == file.name for name in part)
        sharded |= part
    single = load_file(tmp_path / "one" / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in single.values())
    assert all(sharded[name].tobytes() == single[name].tobytes() for name in single)
    assert not list((tmp_path / "out").glob("*.done"))


def test_rankmean_prints_its_shares_and_draws_the_heat_map(tmp_path, capsys):
    pytest.importorskip("PIL")
    checkpoints.family(tmp_path)
    assert run(checkpoints.recipe(tmp_path, "rankmean"), tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert all(f"\n{layer} " in printed for layer in range(3)), printed
    assert f"heat map  {tmp_path / 'out' / 'merge_coefficients.png'}\n" in printed
    assert (tmp_path / "out" / "merge_coefficients.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_statistics_weight_a_streamed_merge(tmp_path, method):
    """Statistics files beside the models, as `python -m dsee_jax statistics` writes them."""
    base, *models = checkpoints.family(tmp_path)
    generator, gathered = np.random.default_rng(1), []
    for number in range(2):
        if method == "fisher":
            arrays = {name: generator.uniform(size=b.shape).astype("float32") for name, b in base.items()}
        else:
            inputs = {
                name: generator.normal(size=(40, b.shape[1]))
                for name, b in base.items()
                if "layers" in name and b.ndim == 2
            }
            arrays = {name: (x.T @ x / 40).astype("float32") for name, x in inputs.items()}
        gathered.append(arrays)
        checkpoints.save(tmp_path / f"statistics_{number}", arrays)
    fields = {
        "merge_method": method,
        "models": [
            {"model": f"model_{number}", "statistics": f"statistics_{number}/model.safetensors"}
            | ({"parameters": {"weight": 1 + number}} if method == "fisher" else {})
            for number in range(2)
        ],
    }
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(fields))
    assert run(path, tmp_path / "out") == 0
    options = {"weight": [1, 2], "statistics": gathered} if method == "fisher" else {"grams": gathered}
    expected = merge.merge(None, models, method=method, **options)
    for name, merged in checkpoints.load(tmp_path / "out").items():
        np.testing.assert_allclose(merged, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_plan_reads_headers_only(tmp_path, capsys, monkeypatch):
    checkpoints.family(tmp_path)
    path = checkpoints.recipe(tmp_path, "ties", each={"weight": 1, "density": 0.5})
    monkeypatch.setattr(tensors, "mapped", None)
    assert run(path, tmp_path / "out", "--plan") == 0
    printed = capsys.readouterr().out
    assert "ties" in printed
    assert "12 to merge" in printed
    assert not (tmp_path / "out").exists()
    assert not hidden_files(tmp_path)


def test_existing_output_is_kept_without_overwrite(tmp_path, capsys):
    checkpoints.family(tmp_path)
    path = checkpoints.recipe(tmp_path, each=WEIGHTED)
    out = tmp_path / "out"
    out.mkdir()
    assert run(path, out) == 0, "an empty folder may be filled"
    shutil.rmtree(out)
    out.mkdir()
    assert run(path, out, "--max-shard-size", "4kB") == 0
    older = contents(out)
    assert "--overwrite" in refused(capsys, path, out)
    assert contents(out) == older
    assert run(path, out, "--overwrite") == 0
    assert not [name for name in contents(out) if "-of-" in name], "old files are never mixed in"
    assert not hidden_files(tmp_path)


@pytest.mark.parametrize("where", ["model_0", "."])
def test_output_that_holds_an_input_is_refused(tmp_path, capsys, where):
    checkpoints.family(tmp_path)
    path = checkpoints.recipe(tmp_path, each=WEIGHTED)
    before = contents(tmp_path / "model_0")
    assert "input" in refused(capsys, path, tmp_path / where, "--overwrite")
    assert contents(tmp_path / "model_0") == before


@pytest.mark.parametrize("method", ["linear", "ties", "rankmean"])
def test_nan_is_refused_or_allowed(tmp_path, capsys, method):
    _, _, b = checkpoints.family(tmp_path)
    b["model.layers.1.mlp.weight"][3, 5] = np.nan
    checkpoints.save(tmp_path / "model_1", b)
    each = {key: 0.5 for key in ("weight", "density") if key in METHODS[method].each}
    path = checkpoints.recipe(tmp_path, method, each=each)
    error = refused(capsys, path, tmp_path / "out")
    assert "model.layers.1.mlp.weight" in error
    assert "--allow-nonfinite" in error
    assert "model_1" in error
    assert not (tmp_path / "out").exists()
    assert not hidden_files(tmp_path)
    assert run(path, tmp_path / "out", "--allow-nonfinite") == 0


@pytest.mark.parametrize(
    ("keys", "parameters", "value"),
    [
        ({"dtype": "float16"}, {}, 70_000),
        ({"out_dtype": "float16"}, {}, 70_000),
        ({"dtype": "bfloat16"}, {}, 3.4e38),
        ({}, {"lambda": 3e38}, 1),
    ],
)
def test_value_beyond_the_written_type_is_refused(tmp_path, capsys, keys, parameters, value):
    """Finite inputs do not become infinity or NaN without a word."""
    trees = checkpoints.family(tmp_path)
    for name, arrays in zip(("base", "model_0", "model_1"), trees, strict=True):
        arrays["model.norm.weight"][3] = value
        checkpoints.save(tmp_path / name, arrays)
    path = checkpoints.recipe(tmp_path, "task_arithmetic", each={"weight": 500}, parameters=parameters, **keys)
    error = refused(capsys, path, tmp_path / "out")
    assert "holds NaN or infinity, though the inputs are finite" in error
    assert "lambda" in parameters or "'model.norm.weight'" in error
    assert not (tmp_path / "out").exists()
    assert not hidden_files(tmp_path)
    assert run(path, tmp_path / "out", "--allow-nonfinite") == 0


FOLDED = [
    ("rankmean", {}),
    ("ties", {}),
    ("ties", {"trim": "global"}),
    ("dare_ties", {}),
    ("breadcrumbs", {}),
    ("sce", {"select_topk": 0.5}),
    ("model_stock", {}),
    ("lines", {"method": "ties", "alpha": 0.5, "beta": 0.5}),
]
"""Methods that read the tensors more than once."""


def folded(tmp_path, method, parameters):
    inner = METHODS[parameters.get("method", method)]
    each = {key: 0.5 for key in ("weight", "density") if key in inner.each}
    return checkpoints.recipe(tmp_path, method, each=each, parameters=parameters)


@pytest.mark.parametrize("which", ["base", "model_0", "model_1"])
@pytest.mark.parametrize(("method", "parameters"), FOLDED)
def test_nan_is_refused_by_the_first_pass(tmp_path, capsys, method, parameters, which):
    """Tensors in a layer, and outside the layers, which RankMean's first pass does not read."""
    trees = dict(zip(("base", "model_0", "model_1"), checkpoints.family(tmp_path), strict=True))
    for name in ("model.layers.2.norm.weight", "lm_head.weight"):
        good = trees[which][name].copy()
        trees[which][name].reshape(-1)[-1] = np.nan
        checkpoints.save(tmp_path / which, trees[which])
        error = refused(capsys, folded(tmp_path, method, parameters), tmp_path / "out")
        assert name in error
        assert f"{which}/model.safetensors" in error
        assert not hidden_files(tmp_path)
        trees[which][name] = good


@pytest.mark.parametrize(("method", "parameters"), [("linear", {}), *FOLDED])
def test_every_element_is_checked_once(tmp_path, monkeypatch, method, parameters):
    """A second reading is not checked again; the merged elements are."""
    base, *models = checkpoints.family(tmp_path)
    seen, nonfinite = [], tiles.nonfinite
    monkeypatch.setattr(tiles, "nonfinite", lambda array: seen.append(array.size) or nonfinite(array))
    assert run(folded(tmp_path, method, parameters), tmp_path / "out") == 0
    files = len(models) + (method != "linear") + 1
    assert sum(seen) == files * sum(leaf.size for leaf in base.values())


def test_resumed_merge_keeps_finished_shards_and_rewrites_damaged_shards(tmp_path, monkeypatch):
    checkpoints.family(tmp_path)
    path, out = checkpoints.recipe(tmp_path, each=WEIGHTED), tmp_path / "out"
    assert run(path, tmp_path / "uninterrupted", "--max-shard-size", "4kB") == 0
    created = []
    create = shards.create

    def counted(file, arrays):
        created.append(file.name)
        if len(created) == 4:
            while len(list(file.parent.glob("*.done"))) < 2:
                time.sleep(0.01)
            raise KeyboardInterrupt
        return create(file, arrays)

    monkeypatch.setattr(shards, "create", counted)
    assert run(path, out, "--max-shard-size", "4kB") == 130
    unfinished = tmp_path / ".out.partial"
    assert not out.exists()
    done = sorted(unfinished.glob("*.safetensors"))
    assert done
    damaged = done[0]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x01")
    created[:] = [None] * 10
    assert run(path, out, "--max-shard-size", "4kB") == 0
    assert damaged.name in created
    assert not {file.name for file in done[1:]} & set(created)
    uninterrupted, resumed = contents(tmp_path / "uninterrupted"), contents(out)
    different = {name for name in uninterrupted if resumed[name] != uninterrupted[name]}
    assert different <= {"README.md"}, "only the model card holds the output's name"


@pytest.mark.parametrize("changed", ["nothing", "comment", "recipe", "input", "config", "size of shards"])
def test_changed_merge_does_not_resume(tmp_path, monkeypatch, changed):
    """A changed recipe, input or shard size deletes the files of an interrupted merge; a comment changes no file."""
    _, a, _ = checkpoints.family(tmp_path)
    path, out, options = checkpoints.recipe(tmp_path, each=WEIGHTED), tmp_path / "out", []
    monkeypatch.setattr(shards, "create", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(path, out) == 130
    (tmp_path / ".out.partial" / "vocab.txt").write_text("older")
    monkeypatch.undo()
    if changed == "comment":
        path.write_text(path.read_text() + "# a comment\n")
    elif changed == "config":
        (tmp_path / "model_0" / "config.json").write_text(json.dumps(checkpoints.CONFIG | {"eps": 1}))
    elif changed == "recipe":
        checkpoints.recipe(tmp_path, "task_arithmetic", each=WEIGHTED)
    elif changed == "input":
        checkpoints.save(tmp_path / "model_0", {name: -array for name, array in a.items()})
    elif changed == "size of shards":
        options = ["--max-shard-size", "4kB"]
    assert run(path, out, *options) == 0
    assert ("vocab.txt" in contents(out)) == (changed in ("nothing", "comment"))


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_input_that_changes_during_the_merge_is_an_error(tmp_path, capsys, monkeypatch, file):
    """The output would be of neither content."""
    checkpoints.family(tmp_path)
    path, merge_tensor = checkpoints.recipe(tmp_path, each=WEIGHTED), engine._merge_tensor

    def changing(*arguments):
        merge_tensor(*arguments)
        changed = tmp_path / "model_0" / file
        os.utime(changed, ns=(0, 0))

    monkeypatch.setattr(engine, "_merge_tensor", changing)
    assert f"model_0/{file} has changed during the merge" in refused(capsys, path, tmp_path / "out")
    assert not hidden_files(tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["shorter", "gone"])
def test_input_that_is_cut_during_the_merge_is_an_error(tmp_path, capsys, monkeypatch, change):
    """Reading a map beyond the end of its file would kill the process."""
    checkpoints.family(tmp_path)
    path, work = checkpoints.recipe(tmp_path, each=WEIGHTED), engine._merge

    def cutting(*arguments):
        file = tmp_path / "model_1" / "model.safetensors"
        file.unlink() if change == "gone" else os.truncate(file, 5000)
        return work(*arguments)

    monkeypatch.setattr(engine, "_merge", cutting)
    assert run(path, tmp_path / "out") in (1, 2)
    assert "model_1/model.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_many_shards_are_written_with_few_open_files(tmp_path, monkeypatch):
    checkpoints.family(tmp_path, layers=20)
    path, held, counts = checkpoints.recipe(tmp_path, each=WEIGHTED), set(), []
    create, abandon = shards.create, shards.Shard.abandon

    def created(file, arrays):
        held.add(file)
        counts.append(len(held))
        return create(file, arrays)

    monkeypatch.setattr(shards, "create", created)
    monkeypatch.setattr(shards.Shard, "abandon", lambda self: (abandon(self), held.discard(self.path)))
    assert run(path, tmp_path / "out", "--max-shard-size", "1") == 0
    assert len(counts) == 63
    assert max(counts) <= engine.OPEN_SHARDS


def test_shard_is_synced_before_its_rename(tmp_path, syncs_and_renames):
    """Otherwise a crash of the machine could leave a damaged shard that is marked as complete."""
    path = tmp_path / "model.safetensors"
    shard = shards.create(path, {"w": ("F32", (3,))})
    shard.sink("w", lambda nbytes: None)(0, np.arange(3, dtype=np.float32))
    shard.close([])
    assert load_file(path)["w"].tolist() == [0, 1, 2]
    file = path.stat().st_ino, path.stat().st_size
    assert syncs_and_renames == [("synced", *file), ("renamed", *file)]


def test_full_disk_leaves_no_files(tmp_path, capsys, monkeypatch):
    checkpoints.family(tmp_path)
    path = checkpoints.recipe(tmp_path, each=WEIGHTED)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    assert "is full" in refused(capsys, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not hidden_files(tmp_path)


@pytest.mark.slow
def test_small_disk_leaves_no_files(tmp_path, capsys, monkeypatch):
    """A real disk: too small from the start, and full during the merge."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    try:
        checkpoints.family(tmp_path, width=128, vocabulary=1000)
        path = checkpoints.recipe(tmp_path, each=WEIGHTED)
        assert " free; the merged model takes " in refused(capsys, path, disk / "out")
        assert not [*disk.glob("[!.]*"), *hidden_files(disk)]
        room = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: room)
        assert "is full" in refused(capsys, path, disk / "out", "--max-shard-size", "600kB")
        assert not [*disk.glob("[!.]*"), *hidden_files(disk)]
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    "kills", [pytest.param(4, marks=pytest.mark.slow), pytest.param(20, marks=pytest.mark.exhaustive)]
)
def test_kill_leaves_a_complete_output_or_none(tmp_path, kills):
    """SIGKILL; the next run completes the output, with the bytes of an uninterrupted run."""
    checkpoints.family(tmp_path, layers=12, width=256, vocabulary=4000)
    path = checkpoints.recipe(tmp_path, "ties", each={"weight": 0.5, "density": 0.5})
    order = lambda out: [sys.executable, "-m", "merge", str(path), str(out), "--max-shard-size", "2MB"]
    subprocess.run(order(tmp_path / "first"), check=True)  # compiles for the later runs
    start = time.monotonic()
    subprocess.run(order(tmp_path / "uninterrupted"), check=True)
    seconds = time.monotonic() - start
    uninterrupted = contents(tmp_path / "uninterrupted")
    killed = 0
    for number in range(kills):
        out = tmp_path / f"out{number}"
        process = subprocess.Popen(order(out), stderr=subprocess.DEVNULL)
        time.sleep(seconds * (0.2 + 0.8 * number / kills))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() != 0
        if out.exists():
            assert contents(out).keys() == uninterrupted.keys()
        else:
            subprocess.run(order(out), check=True)
        output = contents(out)
        assert output.keys() == uninterrupted.keys()
        assert all(output[name] == uninterrupted[name] for name in uninterrupted if name != "README.md")
        shutil.rmtree(out)
    assert killed > kills / 2, "most kills came after the end of the merge"


WORKER = """
import sys, jax
jax.config.update("jax_platforms", "cpu")
address, number, *rest = sys.argv[1:]
jax.distributed.initialize(address, 2, int(number))
from merge.__main__ import main
sys.exit(main(rest))
"""


@pytest.mark.parametrize(
    "method",
    [pytest.param("rankmean", marks=pytest.mark.exhaustive), pytest.param("ties", marks=pytest.mark.slow)],
)
def test_two_processes_write_the_same_bytes(tmp_path, method):
    checkpoints.family(tmp_path)
    each = {key: 0.5 for key in ("weight", "density") if key in METHODS[method].each}
    shared = {"trim": "global"} if method == "ties" else {}
    path = checkpoints.recipe(tmp_path, method, each=each, parameters=shared)
    assert run(path, tmp_path / "one", "--max-shard-size", "4kB") == 0
    address = f"localhost:{random.randint(20000, 60000)}"
    order = [str(path), str(tmp_path / "two"), "--max-shard-size", "4kB"]
    both = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, address, str(number), *order], stderr=subprocess.PIPE, text=True
        )
        for number in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one.keys() == two.keys()
    assert {name for name in one if one[name] != two[name]} <= {"README.md"}


def test_tile_size_changes_no_byte_of_the_output(tmp_path, monkeypatch):
    """DARE's random choices do not depend on the tiles."""
    checkpoints.family(tmp_path)
    path = checkpoints.recipe(
        tmp_path, "dare_ties", each={"weight": 0.5, "density": 0.5}, parameters={"rescale": False}
    )
    outputs = []
    for tile in (64, 1 << 20):
        monkeypatch.setattr(tiles, "TILE", tile)
        assert run(path, tmp_path / f"out{tile}") == 0
        outputs.append((tmp_path / f"out{tile}" / "model.safetensors").read_bytes())
    assert outputs[0] == outputs[1]


@pytest.mark.slow
def test_signal_ends_a_merge_with_one_line_and_the_merge_resumes(tmp_path):
    """Ctrl-C and SIGTERM; no thread keeps the process alive."""
    checkpoints.family(tmp_path, layers=12, width=512, vocabulary=20000)
    path, out = checkpoints.recipe(tmp_path, "ties", each={"weight": 0.5, "density": 0.5}), tmp_path / "out"
    order = [sys.executable, "-m", "merge", str(path), str(out), "--max-shard-size", "10MB"]
    for number, text, status in ((signal.SIGINT, "interrupted", 130), (signal.SIGTERM, "terminated", 143)):
        shutil.rmtree(tmp_path / ".out.partial", ignore_errors=True)
        process = subprocess.Popen(order, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while not (tmp_path / ".out.partial" / "merge.json").exists():
            time.sleep(0.001)
        process.send_signal(number)
        printed, error = process.communicate(timeout=60)
        assert (process.returncode, printed, error) == (status, "", f"merge: {text}; the same command resumes\n")
        assert not out.exists()
    subprocess.run(order, check=True)
    assert out.exists()
