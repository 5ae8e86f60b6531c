"""docs/vision.md says what is so."""

import re
from pathlib import Path

import timm
import torch

from hydra_ssm.vision.dropin import TOLERANCE

PAGE = (Path(__file__).parents[2] / "docs" / "vision.md").read_text(encoding="utf-8")


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        exec(compile(block, "docs/vision.md", "exec"), names)
    assert names["logits"].shape == (2, 10)
    assert [tuple(m.shape) for m in names["maps"]] == [(2, 192, 8, 8)] * 3
    assert names["h"].shape == (2, 50, 64)
    assert (names["h"][1, 37:] == 0).all()
    assert names["features"].shape == (2, 64, 64)


def test_the_parameters_of_the_page_are_those_of_the_models():
    rows = re.findall(r"^\| (\w+_patch\w+) \|(.*)\|$", PAGE, re.MULTILINE)
    assert len(rows) == 5
    for size, numbers in rows:
        names = [
            f"vit_hydra_{size}",
            *(f"vit_{m}_dropin_{size}" for m in ("hydra", "low_rank", "toeplitz", "add", "attention")),
        ]
        for name, number in zip(names, numbers.split("|"), strict=True):
            with torch.device("meta"):
                found = sum(p.numel() for p in timm.create_model(name).parameters())
            assert f"{found:,}" == number.strip(), name
        *matched, vit = (int(number.replace(",", "")) for number in numbers.split("|")[1:])
        assert all(abs(own - vit) <= TOLERANCE * vit for own in matched)
