"""Checksums of a run directory: no byte changes unseen."""

import hashlib
from pathlib import Path

import pytest

from unlearn import manifest
from unlearn.errors import BadInput

FILES = {
    "run.json": b'{"status": "complete"}\n',
    "record.key": b"00ff\n",
    "model/config.json": b"{}",
    "model/model.safetensors": bytes(range(256)),
    "signals/original-forget.parquet": b"PAR1",
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_bytes(content)
    manifest.write(tmp_path / "run")
    return tmp_path / "run"


def test_an_untouched_directory_verifies(run):
    assert manifest.faults(run) == []
    manifest.write(run)
    assert manifest.faults(run) == []


def test_the_list_is_in_the_format_of_sha256sum(run):
    lines = (run / "SHA256SUMS").read_text().splitlines()
    wanted = {f"{hashlib.sha256(content).hexdigest()}  {name}" for name, content in FILES.items()}
    assert set(lines) == wanted


@pytest.mark.parametrize("name", FILES)
def test_any_changed_byte_is_found(run, name):
    content = bytearray(FILES[name])
    for position in range(len(content)):
        content[position] ^= 1
        (run / name).write_bytes(content)
        assert manifest.faults(run) == [f"{name} was changed"]
        content[position] ^= 1


@pytest.mark.parametrize("flip", [0x01, 0x80])
def test_any_changed_byte_of_the_list_is_found(run, flip):
    content = bytearray((run / "SHA256SUMS").read_bytes())
    for position in range(len(content)):
        content[position] ^= flip
        (run / "SHA256SUMS").write_bytes(content)
        assert manifest.faults(run), f"byte {position}"
        content[position] ^= flip
    (run / "SHA256SUMS").write_bytes(content)
    assert manifest.faults(run) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text + "\n",
        lambda text: text.rstrip("\n"),
        lambda text: text.replace("\n", "\r\n"),
        lambda text: "".join(sorted(text.splitlines(keepends=True), reverse=True)),
        lambda text: text + text.splitlines(keepends=True)[0],
    ],
    ids=["line added", "end cut", "other line ends", "other order", "line twice"],
)
def test_any_rewritten_list_is_found(run, change):
    listed = run / "SHA256SUMS"
    listed.write_bytes(change(listed.read_text()).encode())
    assert manifest.faults(run)


@pytest.mark.parametrize("name", [name for name in FILES if name != "record.key"])
def test_a_removed_file_is_found(run, name):
    (run / name).unlink()
    assert manifest.faults(run) == [f"{name} is missing"]


@pytest.mark.parametrize("name", ["more.txt", "model/more.bin", "model/SHA256SUMS.old"])
def test_an_added_file_is_found(run, name):
    (run / name).write_text("more")
    assert manifest.faults(run) == [f"{name} was added"]


def test_a_list_in_a_sub_folder_is_a_file_like_any_other(run):
    (run / "model" / "SHA256SUMS").write_text("more")
    assert manifest.faults(run) == ["model/SHA256SUMS was added"]


def test_added_links_are_found(run, tmp_path):
    (run / "dangling").symlink_to(tmp_path / "nowhere")
    (run / "folder").symlink_to(tmp_path)
    assert manifest.faults(run) == ["dangling was added", "folder was added"]


def test_all_faults_are_listed(run):
    (run / "run.json").write_text("{}")
    (run / "model/config.json").unlink()
    (run / "more").touch()
    assert sorted(manifest.faults(run)) == [
        "model/config.json is missing",
        "more was added",
        "run.json was changed",
    ]


def test_the_key_may_be_kept_apart(run):
    (run / "record.key").unlink()
    assert manifest.faults(run) == []
    (run / "run.json").write_text("{}")
    assert manifest.faults(run) == ["run.json was changed"]
    manifest.write(run)
    (run / "record.key").write_bytes(FILES["record.key"])
    assert manifest.faults(run) == []


@pytest.mark.parametrize("name", ["nowhere", "model", "run.json"])
def test_not_a_run_directory(run, name):
    with pytest.raises(BadInput, match="is not a complete run directory"):
        manifest.faults(run / name)
