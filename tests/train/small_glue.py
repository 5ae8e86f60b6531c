"""GLUE as its files are distributed, but tiny and with something to learn; and a model that can read it."""

import random
from pathlib import Path

from small_text import NOUNS, VERBS

from hydra_ssm.text import HydraForMaskedLM, preset
from hydra_ssm.text.tokenizer import train_tokenizer

HEADERS = {
    "MNLI": ["index", "promptID", "genre", "sentence1", "sentence2", "label1", "gold_label"],
    "QNLI": ["index", "question", "sentence", "label"],
    "QQP": ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
    "RTE": ["index", "sentence1", "sentence2", "label"],
    "SST-2": ["sentence", "label"],
    "MRPC": ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
    "STS-B": ["index", "genre", "sentence1", "sentence2", "score"],
}
TEXTS = ("sentence1", "question", "question1", "#1 String", "sentence"), ("sentence2", "question2", "#2 String")
LABELS = ("gold_label", "label", "is_duplicate", "Quality", "score")
WORDS = {"MNLI": ["entailment", "neutral", "contradiction"], "QNLI": ["entailment", "not_entailment"]}
WORDS["RTE"] = WORDS["QNLI"]


def sentence(draw: random.Random, first: str) -> str:
    return f'the {first} {draw.choice(VERBS)} a "{draw.choice(NOUNS)}'  # a quote that never closes


def row(task: str, number: int, draw: random.Random, labelled: bool) -> list[str]:
    """A line's cells; the label is told by the first noun."""
    kind = draw.randrange(len(WORDS.get(task, "01")))
    label = f"{5.0 * kind:.3f}" if task == "STS-B" else WORDS.get(task, "01")[kind]
    text = sentence(draw, NOUNS[kind])
    if task == "CoLA":
        return ["gj04", label, "", text] if labelled else [str(number), text]
    cells = []
    for name in header(task, labelled):
        pair = name == "sentence" and task == "QNLI"
        if name in LABELS:
            cells.append(label)
        elif name in TEXTS[1] or pair:
            cells.append(sentence(draw, draw.choice(NOUNS)))
        elif name in TEXTS[0]:
            cells.append(text)
        else:
            cells.append(str(number) if name in ("index", "id") else "x")
    return cells


def header(task: str, labelled: bool) -> list[str]:
    if task == "CoLA":
        return [] if labelled else ["index", "sentence"]
    names = HEADERS[task]
    if labelled:
        return names
    return [*([] if names[0] in ("index", "id") else ["index"]), *(name for name in names if name not in LABELS)]


def write(path: Path, task: str, rows: int, labelled: bool = True, seed: int = 0) -> None:
    draw = random.Random(seed)
    lines = [header(task, labelled), *(row(task, i, draw, labelled) for i in range(rows))]
    text = "".join("\t".join(cells) + "\n" for cells in lines if cells)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((b"\xef\xbb\xbf" if task == "MRPC" else b"") + text.encode())


def write_glue(folder: Path, rows: int = 64) -> Path:
    """All eight tasks, with test sets."""
    for task in ("CoLA", *HEADERS):
        write(folder / task / "train.tsv", task, rows)
        for part in ("_matched", "_mismatched") if task == "MNLI" else ("",):
            write(folder / task / f"dev{part}.tsv", task, rows // 2, seed=1)
            write(folder / task / f"test{part}.tsv", task, 5, labelled=False, seed=2)
    return folder


def write_model(folder: Path) -> Path:
    """As pretrain leaves one."""
    words = f"the a quick text {' '.join(NOUNS)} {' '.join(VERBS)} good bad . \" ' , :"
    tokenizer = train_tokenizer([words] * 3, 200)
    config = preset("hydra-tiny", vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, d_state=4, headdim=16)
    HydraForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
