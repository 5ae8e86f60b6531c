"""What serving a trained model costs on this machine: packed embedding, exported files, int8 weights.

    python benchmarks/serving.py runs/mine books/ --json results/serving.json

Texts are the paragraphs of the files. Each part checks that what it times computes the same, then times it in turns.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

from hydra_ssm.bench.clock import interleaved
from hydra_ssm.bench.machine import device_name
from hydra_ssm.text import HydraForMaskedLM
from hydra_ssm.text.export import example_inputs, read_onnx, write_int8, write_onnx
from hydra_ssm.text.inference import TextModel, load, paragraphs
from hydra_ssm.text.reading import read_text

BATCH = 32  # texts in a padded batch
LENGTHS = (512, 2048, 8192)

LONG = """
import sys, torch
from pathlib import Path
from hydra_ssm.text import HydraForMaskedLM
from hydra_ssm.text.export import example_inputs, read_onnx
from hydra_ssm.text.inference import load
kind, folder, file, length = sys.argv[1:]
model = load(Path(folder), HydraForMaskedLM, dtype=torch.float32)[0]
run = read_onnx(Path(file)) if kind == "onnx" else model
inputs = example_inputs(model.config, 1, int(length))
def held(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1e3
open("/proc/self/clear_refs", "w").write("5")  # the most held so far is forgotten
before = held("VmRSS")
with torch.no_grad():
    run(*inputs)
print(held("VmHWM") - before)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder with a masked language model")
    parser.add_argument("text", type=Path, help="a folder of texts that the model has not seen")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--texts", type=int, default=512, help="paragraphs to embed (default: %(default)s)")
    parser.add_argument("--part", choices=("embed", "exported", "int8"), help="measure this again")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    files = sorted(path for path in given.text.rglob("*") if path.is_file())
    texts = [part for file in files for part in paragraphs(read_text(file))]
    texts = texts[:: max(1, len(texts) // given.texts)][: given.texts]
    parts: dict[str, Callable[[], dict]] = {
        "embed": lambda: embedding(given.model, texts),
        "exported": lambda: exported(given.model),
        "int8": lambda: int8(given.model, texts),
    }
    known = (
        json.loads(given.json.read_text(encoding="utf-8")) if given.part and given.json and given.json.exists() else {}
    )
    for name in [given.part] if given.part else parts:
        known[name] = parts[name]() | {"machine": machine()}
        if given.json:
            given.json.parent.mkdir(parents=True, exist_ok=True)
            given.json.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def embedding(folder: Path, texts: list[str]) -> dict:
    """Tokens a second of embed, beside the same model on padded batches, in the file's order and sorted by length."""
    rows: dict[str, dict] = {}
    exact = TextModel(folder, torch.float32).embed(texts)
    ids = TextModel(folder).tokenizer(texts)["input_ids"]
    tokens = sum(map(len, ids))
    print(f"\n{len(texts)} texts of {min(map(len, ids))} to {max(map(len, ids))} tokens, {tokens} in all")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = TextModel(folder, dtype)
        runs = {
            "padded": lambda model=model: padded(model, texts, range(len(ids))),
            "sorted": lambda model=model: padded(model, texts, sorted(range(len(ids)), key=lambda i: len(ids[i]))),
            "packed": lambda model=model: model.embed(texts),
        }
        error = {name: (run() - exact).abs().max().item() for name, run in runs.items()}
        assert max(error.values()) < (1e-4 if dtype == torch.float32 else 32 * torch.finfo(dtype).eps), error
        seconds = interleaved(runs, repeats=2)
        name = str(dtype).removeprefix("torch.")
        rows[name] = {"tokens_a_second": {k: tokens / s for k, s in seconds.items()}, "largest_difference": error}
        speeds = "   ".join(f"{k} {tokens / s:7.0f}" for k, s in seconds.items())
        print(f"  {name:9} tokens a second: {speeds}   from float32 {error['packed']:.1e}")
    waste = {k: 1 - tokens / grid(ids, k) for k in ("padded", "sorted")}
    print("  padding: " + ", ".join(f"{k} {share:.0%}" for k, share in waste.items()))
    return {"texts": len(texts), "tokens": tokens, "padding": waste} | rows


def grid(ids: list[list[int]], order: str) -> int:
    """Places in the padded batches of these texts."""
    sizes = sorted(map(len, ids)) if order == "sorted" else [len(i) for i in ids]
    batches = [sizes[start : start + BATCH] for start in range(0, len(sizes), BATCH)]
    return sum(max(batch) * len(batch) for batch in batches)


@torch.no_grad()
def padded(model: TextModel, texts: list[str], order: range | list[int]) -> torch.Tensor:
    """As pipelines do: batches of texts, padded to the longest."""
    order, vectors = list(order), torch.empty(len(texts), model.model.config.hidden_size)
    for start in range(0, len(order), BATCH):
        some = order[start : start + BATCH]
        batch = model.tokenizer([texts[i] for i in some], padding=True, return_tensors="pt")
        mask = batch["attention_mask"]
        hidden = model.model.model(batch["input_ids"], mask).last_hidden_state.float()
        vectors[some] = hidden.sum(1) / mask.sum(1, keepdim=True)
    return vectors


def exported(folder: Path) -> dict:
    """Seconds and memory of the ONNX file at lengths, beside the model itself, one sequence."""
    model, rows = load(folder, HydraForMaskedLM, dtype=torch.float32)[0], {}
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "model.onnx"
        write_onnx(model, file)
        run = read_onnx(file)
        print(f"\nONNX, {file.stat().st_size / 1e6:.1f} MB; one sequence, words predicted at every token")
        for length in LENGTHS:
            inputs = example_inputs(model.config, 1, length)
            with torch.no_grad():
                error = (run(*inputs)[0] - model(*inputs).logits).abs().max().item()
                assert error < 1e-4, error
                seconds = interleaved(
                    {"onnx": lambda i=inputs: run(*i), "torch": lambda i=inputs: model(*i)}, repeats=3
                )
            megabytes = {kind: peak(kind, folder, file, length) for kind in ("onnx", "torch")}
            rows[length] = {"seconds": seconds, "MB": megabytes, "largest_difference": error}
            print(
                f"  L = {length:5d}  " + "   ".join(f"{k} {seconds[k]:6.3f} s {megabytes[k]:6.0f} MB" for k in seconds)
            )
    return rows


def peak(kind: str, folder: Path, file: Path, length: int) -> float:
    """MB that one call takes at its most in a new process, which has loaded everything before. On Linux."""
    command = [sys.executable, "-c", LONG, kind, str(folder), str(file), str(length)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def int8(folder: Path, texts: list[str]) -> dict:
    """Size, masked-word loss and accuracy of int8 weights, beside the same in float32."""
    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as scratch:
        write_int8(folder, HydraForMaskedLM, Path(scratch))
        for name, place in (("float32", folder), ("int8", Path(scratch))):
            model = TextModel(place)
            found[name] = masked(model, texts) | {"MB": (place / "model.safetensors").stat().st_size / 1e6}
        print("\nint8 weights")
        for name, row in found.items():
            print(f"  {name:8} {row['MB']:7.1f} MB   masked loss {row['loss']:.4f}   accuracy {row['accuracy']:.2%}")
    return found


@torch.no_grad()
def masked(model: TextModel, texts: list[str]) -> dict:
    """Loss and accuracy on every seventh word, hidden."""
    loss, right, count = 0.0, 0, 0
    for text in texts:
        ids = model.tokenizer(text, return_tensors="pt", truncation=True, max_length=256)["input_ids"]
        place = torch.arange(3, ids.shape[1] - 1, 7)
        if not len(place):
            continue
        hidden = ids.clone()
        hidden[0, place] = model.tokenizer.mask_token_id
        logits = model.model(hidden).logits[0, place]
        loss += float(torch.nn.functional.cross_entropy(logits, ids[0, place], reduction="sum"))
        right += int((logits.argmax(-1) == ids[0, place]).sum())
        count += len(place)
    return {"loss": loss / count, "accuracy": right / count, "words": count}


def machine() -> dict:
    cpu = torch.device("cpu")
    return {
        "device": device_name(cpu),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": str(date.today()),
    }


if __name__ == "__main__":
    main()
