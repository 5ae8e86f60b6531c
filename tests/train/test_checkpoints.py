"""A folder is whole or not there, and damage is seen."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from processes import start
from safetensors.torch import save_file

from hydra_ssm.train.checkpoints import (
    KEPT,
    MANIFEST,
    REMOVED,
    SHARE,
    SaveTimer,
    checkpoints,
    damage,
    newest_whole,
    remove_old,
    remove_unfinished,
    whole_file,
    whole_folder,
)
from hydra_ssm.train.errors import UserError
from hydra_ssm.train.folder import RunFolder


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


def test_saving_takes_its_share_of_the_time_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("hydra_ssm.train.checkpoints.time.monotonic", lambda: now)

    def saves(every: float, lasts: float, until: float) -> list[float]:
        """When it begins to save, where a step takes a second and saving so many."""
        nonlocal now
        now, found = 0.0, list[float]()
        timer = SaveTimer(every)
        while now < until:
            now += 1
            if timer.due:
                found.append(now)
                timer.begin()
                now += lasts
                timer.end()
        return found

    assert saves(60, 0.5, 300) == [60, 120.5, 181, 241.5]  # every minute
    slow = saves(60, 12, 2000)  # a disk that many write to
    assert slow[0] == 60
    assert 12 * (len(slow) - 1) <= SHARE * (slow[-1] - slow[0])
    assert len(slow) == 8
    assert saves(0, 1, 10) == [1, 3, 5, 7, 9]  # after every step, whatever that takes


def test_a_file_is_replaced_by_a_whole_one_alone(tmp_path: Path) -> None:
    path, link = tmp_path / "real.npy", tmp_path / "link.npy"
    path.write_text("old", encoding="utf-8")
    link.symlink_to(path)
    with pytest.raises(UnicodeEncodeError), whole_file(link) as part:
        part.write_text("n\u00eb", encoding="ascii")
    assert path.read_text(encoding="utf-8") == "old"
    with whole_file(link) as part:
        part.write_text("new", encoding="utf-8")
    assert path.read_text(encoding="utf-8") == "new"
    assert files(tmp_path) == {"real.npy", "link.npy"}


def test_what_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rename = write(tmp_path, 1), Path.rename

    def fail_once(self: Path, target: Path) -> Path:
        if target == path:
            monkeypatch.setattr(Path, "rename", rename)
            raise PermissionError
        return rename(self, target)

    before = files(tmp_path)
    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(PermissionError):
        write(tmp_path, 1)
    assert files(tmp_path) == before
    assert damage(path) is None


def killed_before_it_is_there(target: Path) -> None:
    rename = Path.rename
    Path.rename = lambda self, to: os._exit(9) if to == target else rename(self, to)  # type: ignore[method-assign]
    with whole_folder(target) as part:
        (part / "recipe.json").write_text("new")


def test_what_a_killed_process_was_about_to_replace_comes_back(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for content, come_back in (("one", folder.exists), ("two", lambda: remove_unfinished(tmp_path))):
        with whole_folder(folder.training) as part:
            (part / "recipe.json").write_text(content, encoding="utf-8")
        process = start(killed_before_it_is_there, folder.training)
        process.join()
        assert process.exitcode == 9
        assert not folder.training.exists()
        come_back()
        assert folder.recipe.read_text(encoding="utf-8") == content
        remove_unfinished(tmp_path)
        assert files(tmp_path) == {"training/recipe.json", "training/manifest.json"}


def test_what_a_killed_process_was_removing_does_not_come_back(tmp_path: Path) -> None:
    write(tmp_path, 1).rename(tmp_path / f"{REMOVED}checkpoint-1")
    remove_unfinished(tmp_path)
    assert not files(tmp_path)


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


@pytest.mark.parametrize("writer", WRITERS)
def test_a_limit_of_files_is_named_whatever_was_writing(writer: str, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        expected = r"a file may not be as large .*checkpoint-2 could not be saved; what was"
        with pytest.raises(UserError, match=expected), whole_folder(tmp_path / "checkpoint-2") as part:
            WRITERS[writer](part / "weights")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not files(tmp_path)


def test_a_full_disk_is_named_where_none_can_be_mounted(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(UserError, match="disk is full"), whole_folder(tmp_path / "checkpoint-1"):
        full.write_bytes(b"0")
    assert not files(tmp_path)
