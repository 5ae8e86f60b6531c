"""Fine-tunes an encoder to give alike sentences alike vectors, on STS-B, by the sentence-transformers library.

    pip install 'hydra-ssm[train]' 'sentence-transformers>=6'
    hydra-ssm pretrain books/ --out runs/mine
    python examples/sentence_transformers_finetune.py runs/mine glue/STS-B --out runs/mine-sts

A saved folder is all that the library needs: `import hydra_ssm.text` tells transformers what is in it. Vectors are the
mean of each text's tokens, as hydra-ssm embed computes them. The score is Spearman's correlation between the cosines of
the vectors and the judgements of dev.tsv, before and after. A small model takes minutes on a CPU.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path

import hydra_ssm.text  # noqa: F401 - registers the models with transformers

# isort: split
from datasets import Dataset
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import CoSENTLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers.utils.logging import set_verbosity_error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder that hydra-ssm pretrain or convert wrote")
    parser.add_argument("data", type=Path, help="a folder with STS-B's train.tsv and dev.tsv")
    parser.add_argument("--out", type=Path, required=True, help="a folder for the fine-tuned model")
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="default: %(default)s, for small models")
    parser.add_argument("--limit", type=int, help="use only so many pairs of each file")
    given = parser.parse_args()
    set_verbosity_error()  # a masked language model's head is left out on purpose
    model = encoder(given.model)
    train, dev = (read(given.data / name, given.limit) for name in ("train.tsv", "dev.tsv"))
    print(f"{len(train)} pairs to learn from, {len(dev)} to judge by")
    print(f"before: Spearman {score(model, dev):.3f}")
    finetune(model, train, given.epochs, given.learning_rate)
    print(f"after:  Spearman {score(model, dev):.3f}")
    model.save(str(given.out))
    print(f"wrote {given.out}, for SentenceTransformer({str(given.out)!r})")


def encoder(folder: Path) -> SentenceTransformer:
    """A saved model with mean pooling, on the CPU or the GPU."""
    words = Transformer(str(folder), max_seq_length=128)
    return SentenceTransformer(modules=[words, Pooling(words.get_embedding_dimension(), pooling_mode="mean")])


def read(file: Path, limit: int | None) -> Dataset:
    """Pairs of sentences and their likeness, 0 to 1."""
    with file.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))[:limit]
    names = ("sentence1", "sentence2")
    return Dataset.from_dict(
        {n: [row[n] for row in rows] for n in names} | {"score": [float(row["score"]) / 5 for row in rows]}
    )


def score(model: SentenceTransformer, pairs: Dataset) -> float:
    """Spearman's correlation of cosines and judgements."""
    first, second = (
        model.encode(list(pairs[name]), normalize_embeddings=True, show_progress_bar=False)
        for name in ("sentence1", "sentence2")
    )
    return float(spearmanr((first * second).sum(1), pairs["score"]).statistic)


def finetune(model: SentenceTransformer, pairs: Dataset, epochs: float, learning_rate: float) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        arguments = SentenceTransformerTrainingArguments(
            scratch, num_train_epochs=epochs, learning_rate=learning_rate, per_device_train_batch_size=32,
            warmup_steps=0.06, save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True, seed=0,
        )  # fmt: skip
        SentenceTransformerTrainer(model=model, args=arguments, train_dataset=pairs, loss=CoSENTLoss(model)).train()


if __name__ == "__main__":
    main()
