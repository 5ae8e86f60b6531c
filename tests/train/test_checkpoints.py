"""A folder is whole or not there, and damage is seen."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hydra_ssm.train.checkpoints import KEPT, MANIFEST, checkpoints, damage, newest_whole, remove_old, whole_folder
from hydra_ssm.train.errors import UserError


def write(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    with whole_folder(path) as part:
        (part / "weights").write_bytes(bytes(1000))
        (part / "state").mkdir()
        (part / "state" / "step").write_text(str(step), encoding="utf-8")
    return path


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_folder_appears_with_all_its_files_and_their_hashes(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    assert files(tmp_path) == {f"checkpoint-1/{name}" for name in ("weights", "state/step", MANIFEST)}
    assert damage(path) is None


def test_an_error_while_writing_leaves_what_was_there(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    before = files(tmp_path)
    with pytest.raises(FileNotFoundError), whole_folder(path) as part:
        (part / "nowhere" / "weights").write_bytes(b"new")
    assert files(tmp_path) == before
    assert damage(path) is None


def flip_a_bit(path: Path) -> None:
    data = bytearray((path / "weights").read_bytes())
    data[500] ^= 1
    (path / "weights").write_bytes(data)


DAMAGES = {
    "weights has changed": flip_a_bit,
    "weights has changed since": lambda path: (path / "weights").write_bytes(bytes(999)),
    "state/step is missing": lambda path: (path / "state" / "step").unlink(),
    f"{MANIFEST} is missing": lambda path: (path / MANIFEST).unlink(),
    "cannot be read": lambda path: (path / MANIFEST).write_text("{", encoding="utf-8"),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_the_checkpoint_before_a_damaged_one_is_taken_with_a_warning(reason: str, tmp_path: Path) -> None:
    paths = [write(tmp_path, step) for step in (5, 10)]
    assert newest_whole(tmp_path) == paths[1]
    DAMAGES[reason](paths[1])
    with pytest.warns(UserWarning, match=f"checkpoint-10 is damaged .*{reason}"):
        assert newest_whole(tmp_path) == paths[0]


def test_old_checkpoints_go_by_number_and_not_by_name(tmp_path: Path) -> None:
    for step in (100, 9, 20, 1000, 30):
        write(tmp_path, step)
    remove_old(tmp_path)
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in (30, 100, 1000)[-KEPT:]]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB, where one may be mounted."""
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield path
    subprocess.run(["umount", path], check=True)


WRITERS = {
    "python": lambda path: path.write_bytes(bytes(2_000_000)),
    "torch": lambda path: torch.save(torch.zeros(500_000), path),
    "safetensors": lambda path: save_file({"x": torch.zeros(500_000)}, path),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_named_whatever_was_writing(writer: str, small_disk: Path) -> None:
    path = write(small_disk, 1)
    expected = r"the disk is full: .*checkpoint-2 could not be saved; what was saved before is intact"
    with pytest.raises(UserError, match=expected), whole_folder(small_disk / "checkpoint-2") as part:
        WRITERS[writer](part / "weights")
    assert [p.name for p in small_disk.iterdir()] == ["checkpoint-1"]
    assert damage(path) is None


def test_a_full_disk_is_named_where_none_can_be_mounted(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(UserError, match="disk is full"), whole_folder(tmp_path / "checkpoint-1"):
        full.write_bytes(b"0")
    assert not files(tmp_path)
