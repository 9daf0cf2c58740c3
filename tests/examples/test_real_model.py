"""`examples/real_model.py` without a network: what it makes of the packages, and what it says when there are none."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from examples import real_model
from src.models.loading import load_causal_lm
from src.models.settings import ModelSettings
from tests.models.test_gguf import file, lm  # noqa: F401 - fixtures


def tar_of(**files: bytes) -> bytes:
    """A compressed tar archive."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return content.getvalue()


@pytest.fixture
def packages(tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> list[Path]:  # noqa: F811
    """A wheel with a GGUF file and a source archive with ratings, which `fetch` finds."""
    wheel, source = tmp_path / "a.whl", tmp_path / "b.tar.gz"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, "package/model.gguf")
    ratings = "1\t2.5\tA très good film.\n2\t-1\tDull\n".encode()
    resources = tar_of(**{"hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": ratings})
    source.write_bytes(tar_of(**{"v/additional_resources/hutto_ICWSM_2014.tar.gz": resources}))
    monkeypatch.setattr(real_model, "fetch", lambda folder: [wheel, source])
    return [wheel, source]


def test_the_packages_become_a_plain_folder_and_a_file(packages: list[Path], file: str, tmp_path: Path) -> None:  # noqa: F811
    target = tmp_path / "real"
    real_model.prepare(target)
    plain = AutoModelForCausalLM.from_pretrained(target / real_model.MODEL)
    for a, b in zip(plain.parameters(), load_causal_lm(ModelSettings(path=file)).parameters(), strict=True):
        assert torch.equal(a, b)
    assert "package `a.whl`" in (target / real_model.MODEL / "README.md").read_text()
    rows = [json.loads(line) for line in (target / real_model.REVIEWS).read_text(encoding="utf-8").splitlines()]
    assert rows == [
        {"id": "1", "rating": 2.5, "text": "A très good film."},
        {"id": "2", "rating": -1.0, "text": "Dull"},
    ]
    assert {path.name for path in target.iterdir()} == {real_model.MODEL, real_model.REVIEWS}


def test_what_is_there_is_not_fetched_again(
    packages: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_model.prepare(tmp_path / "real")
    monkeypatch.setattr(real_model, "fetch", lambda folder: pytest.fail("fetched again"))
    real_model.prepare(tmp_path / "real")


def test_a_failure_leaves_nothing_half_written(
    packages: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages[1].write_bytes(tar_of(other=b""))
    with pytest.raises(StopIteration):
        real_model.prepare(tmp_path / "real")
    assert list((tmp_path / "real").iterdir()) == []


def test_without_the_package_index_both_roads_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise subprocess.CalledProcessError(1, "pip")

    monkeypatch.setattr(subprocess, "run", refused)
    monkeypatch.setattr(sys, "argv", ["real_model", str(tmp_path / "real")])
    with pytest.raises(
        SystemExit, match=r"examples/real\.txt cannot be downloaded.*HuggingFaceTB/SmolLM2-135M-Instruct"
    ):
        real_model.main()


def test_every_package_is_pinned_with_its_checksum() -> None:
    lines = [line for line in real_model.PINS.read_text().splitlines() if line and not line.startswith("#")]
    assert all("==" in line and "--hash=sha256:" in line for line in lines)
