"""A text file, sums that are the same in every process, and processes that need not import everything again."""

from multiprocessing import context
from pathlib import Path

import pytest
import torch
from processes import warm
from small_text import sentences


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "sentences.txt"
    path.write_text(sentences(300), encoding="utf-8")
    return path


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """More would add in another order than the processes that the tests start."""
    torch.set_num_threads(1)


@pytest.fixture
def warm_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is begun with `spawn` comes out of a process that has imported; its environment is that of the first."""
    monkeypatch.setitem(context._concrete_contexts, "spawn", warm())
