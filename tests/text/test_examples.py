"""What examples/ shows works on a small scale."""

import random
import re
import subprocess
import sys
from pathlib import Path

import torch
from small_models import tiny
from test_inference import save

from hydra_ssm.text import HydraForMaskedLM
from hydra_ssm.text.inference import TextModel

ROOT = Path(__file__).resolve().parents[2]


def write_pairs(file: Path, count: int) -> None:
    """Sentences that are alike where both speak of the cat, or both of the mat."""
    chance, lines = random.Random(count), ["index\tsentence1\tsentence2\tscore"]
    for number in range(count):
        first, second = chance.choice(["cat", "mat"]), chance.choice(["cat", "mat"])
        fill = lambda: chance.choice(["the", "a", "on the", 'sat " on a'])  # noqa: E731
        lines.append(f"{number}\t{fill()} {first}\t{fill()} {second} .\t{5.0 if first == second else 0.0}")
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_sentence_transformers_learns_what_is_alike_and_saves_what_embed_computes(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer  # takes seconds, in each process that collects tests

    folder = save(HydraForMaskedLM(tiny(vocab_size=16, num_hidden_layers=1)), tmp_path / "model")
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    write_pairs(data / "train.tsv", 320)
    write_pairs(data / "dev.tsv", 60)
    command = [sys.executable, ROOT / "examples" / "sentence_transformers_finetune.py", folder, data, "--out", out]
    run = subprocess.run(
        [*map(str, command), "--learning-rate", "5e-3"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "320 pairs to learn from, 60 to judge by" in run.stdout
    before, after = (float(found) for found in re.findall(r"Spearman (-?[\d.]+)", run.stdout))
    assert after > max(before, 0.8)
    texts = ["the cat", "a mat sat on the cat ."]
    vectors = torch.from_numpy(SentenceTransformer(str(out), device="cpu").encode(texts))
    torch.testing.assert_close(vectors, TextModel(out).embed(texts), rtol=1e-5, atol=1e-5)
