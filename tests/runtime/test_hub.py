"""Uploads to the hub, against a stand-in on this machine."""

import pytest

import hub as stand_in
from dsee_jax.errors import InputError, Stopped
from dsee_jax.runtime import hub


@pytest.fixture
def server(monkeypatch):
    with stand_in.opened(monkeypatch) as server:
        yield server


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "out"
    (folder / "inner").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "inner" / "model.safetensors").write_bytes(bytes(range(256)))
    return folder


@pytest.mark.parametrize(("repo", "full"), [("team/model", "team/model"), ("model", "me/model")])
def test_folder_is_uploaded(server, folder, repo, full):
    assert hub.push(folder, repo) == f"{server.url}/{full}"
    assert server.files[full] == {"config.json": b"{}", "inner/model.safetensors": bytes(range(256))}


def test_repository_that_may_not_be_written_is_one_line(server, folder):
    server.refuses["other/model"] = 403
    with pytest.raises(InputError) as error:
        hub.push(folder, "other/model")
    line = str(error.value)
    assert "\n" not in line
    for part in ("--push other/model: ", "403", "don't have the rights", f"hf upload other/model {folder}"):
        assert part in line
    assert (folder / "config.json").exists()


def test_wrong_token_is_one_line(server, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(InputError, match=r"^--push a/b: .*401.*; .*hf upload a/b "):
        hub.push(folder, "a/b")


def test_missing_token_is_one_line(server, folder, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"^--push a/b: "):
        hub.push(folder, "a/b")


@pytest.mark.parametrize(("status", "kind"), [(400, InputError), (429, Stopped), (503, Stopped)])
def test_hub_that_fails_is_told_apart_from_a_wrong_request(server, folder, status, kind):
    server.refuses["a/b"] = status
    with pytest.raises(kind, match=f"^--push a/b: {status} "):
        hub.push(folder, "a/b")


def test_hub_that_is_not_reached_is_a_failure_of_the_machine(folder, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    with pytest.raises(Stopped, match=r"--push a/b: the hub cannot be reached .*hf upload a/b"):
        hub.push(folder, "a/b")


@pytest.mark.parametrize("repo", ["a/b/c", "a b", "", "../x"])
def test_name_that_is_no_repository_is_refused_before_any_work(repo):
    with pytest.raises(InputError, match="--push"):
        hub.check(repo)
