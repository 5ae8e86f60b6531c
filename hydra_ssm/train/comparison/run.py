"""One run of the comparison: its model, its training, and the record that it leaves."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import set_seed

from ...bench.machine import facts
from ...text import HydraForMaskedLM, preset
from ...text.collators import IGNORED, MaskedLMCollator
from ...text.messages import quiet
from ..batches import Batches
from ..checkpoints import remove, whole_folder
from ..errors import UserError
from ..loop import Course, NotFinite, Training, free_memory
from ..records import Record, read_json, read_records, write_json
from ..trainee import How
from ..workers import Say, Until
from .data import TRAIN, Data
from .plan import DECAY, NORMS, TEXTS, Plan, Run

RUNS, MODELS_FOLDER, CHECKPOINTS = "runs", "models", "checkpoints"
CLIP = 1.0
MODEL_STAGES = ("tokens", "seconds")  # of runs whose models are kept
FEW = 4  # evaluations of a run of which the end alone counts
PARTS = 32  # of a held-out text, whose losses tell how exact their mean is
EARLIER = {"norm": NORMS[0]}  # what a record of an earlier version does not say
POSITIONS = "model.embeddings.position_embeddings.weight"


def finished(out: Path, name: str) -> Record | None:
    """The record of a run that has come to its end."""
    found = read_json(out / RUNS / f"{name}.json")
    return found and EARLIER | found


def all_finished(out: Path) -> list[Record]:
    """The records of all such runs, by their names."""
    return [EARLIER | found for found in read_records(out / RUNS)]


def train(out: Path, run: Run, plan: Plan, data: Data, until: Until, how: How, say: Say) -> Record | None:
    """Go on with a run to its end, and keep its record in a file of its own. None where it had to stop before."""
    if (found := finished(out, run.name)) or until.over():
        return found
    folder, began = out / CHECKPOINTS / run.name, time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    record: Record = {"name": run.name, **asdict(run), "preset": getattr(plan, run.model)}
    free_memory()
    with quiet():
        training = _training(out, run, plan, data, folder, how, say)
        try:
            if not training.fit(until):
                return None
            scores = _scores(training, plan, data, run.length, until)
            if scores is None:
                training.save()
                return None
            record |= _results(training) | scores
        except NotFinite as error:
            say(f"{run.name} has diverged {error}")
            record["diverged"] = str(error)
        if run.stage in MODEL_STAGES and "diverged" not in record:
            with whole_folder(out / MODELS_FOLDER / run.name) as part:
                net = training.trainee.net  # tasks have longer rows, where learned positions must not be random
                longer(net, plan.length, net.config.max_position_embeddings).save_pretrained(part)
                data.tokenizer.save_pretrained(part)
    record["seconds_in_all"] = round(time.perf_counter() - began, 1)  # of the call that ended it
    write_json(out / RUNS / f"{run.name}.json", record)
    remove(folder)
    return record


def _training(out: Path, run: Run, plan: Plan, data: Data, folder: Path, how: How, say: Say) -> Training:
    goes_on = run.start is not None  # what it knew before, and what after: both of all the text
    few = 1 if goes_on else FEW
    course = Course(
        run.name, run.steps, run.rate, DECAY / run.rate, CLIP, run.draw,
        evaluations=plan.evaluations if run.stage in MODEL_STAGES else min(few, plan.evaluations), evaluate_first=True,
        batch_tokens=plan.batch_tokens, save_after=plan.save_after,
    )  # fmt: skip
    most = None if goes_on else plan.evaluation_tokens
    texts = {name: data.evaluation(name, run.length, most) for name in TEXTS}
    return Training(
        course, batches(data, run.length, plan, run.draw), texts, _model(out, run, plan, data), folder, how, say
    )


def batches(data: Data, length: int, plan: Plan, seed: int) -> Batches:
    """Of both models alike."""
    rows, collator = data.rows(TRAIN, length), MaskedLMCollator(data.tokenizer, plan.mask_rate)
    return Batches(rows, collator, plan.batch_tokens // length, seed)


def _model(out: Path, run: Run, plan: Plan, data: Data) -> HydraForMaskedLM:
    """New, or the one of the run that it goes on from."""
    set_seed(run.seed)
    if run.start is None:
        words = {"vocab_size": -(-len(data.tokenizer) // 8) * 8, "pad_token_id": data.tokenizer.pad_token_id}
        return HydraForMaskedLM(preset(getattr(plan, run.model), norm=run.norm, **words))
    source = out / MODELS_FOLDER / run.start
    if not source.is_dir():
        raise UserError(f"{source} is missing: remove {out / RUNS / run.start}.json to train it again")
    return longer(HydraForMaskedLM.from_pretrained(source), plan.length, run.length)


def longer(net: HydraForMaskedLM, trained: int, length: int) -> HydraForMaskedLM:
    """The model for rows of another length: learned positions, if it has any, repeat those that were trained."""
    if not net.config.position_embeddings or length <= trained:
        return net
    state = net.state_dict()
    table = state[POSITIONS][:trained]
    state[POSITIONS] = table.repeat(-(-length // trained), 1)[:length]
    config = type(net.config)(**{**net.config.to_dict(), "max_position_embeddings": length})
    other = HydraForMaskedLM(config)
    other.load_state_dict(state)
    return other


def _scores(training: Training, plan: Plan, data: Data, length: int, until: Until) -> Record | None:
    """On all of each held-out text: loss, accuracy, the loss's standard error, and both of consecutive parts.

    None where the time was over before: on a CPU all of a text may take minutes.
    """
    found: dict[str, Record] = {"losses": {}, "accuracies": {}, "errors": {}, "parts": {}}
    for name in TEXTS:
        inputs, labels = data.evaluation(name, length)
        count = min(PARTS, len(inputs))
        scores = []
        for own in zip(inputs.tensor_split(count), labels.tensor_split(count), strict=True):
            if until.over():
                return None
            if (own[1] != IGNORED).any():
                scores.append(training.trainee.score(*own, plan.batch_tokens))
        tokens = sum(s.tokens for s in scores)
        parts = [(s.loss, s.tokens) for s in scores]
        found["losses"][name], found["errors"][name] = mean_of_parts(parts)
        found["accuracies"][name] = sum(s.accuracy * s.tokens for s in scores) / tokens
        found["parts"][name] = parts
    return found


def mean_of_parts(parts: Sequence[tuple[float, int]]) -> tuple[float, float | None]:
    """(mean, its standard error) of what is known of parts of a text with so many tokens each.

    Tokens of a document are alike, so that parts and not tokens are what is drawn independently; None for one part.
    """
    tokens, count = sum(n for _, n in parts), len(parts)
    mean = sum(value * n for value, n in parts) / tokens
    if count == 1:
        return mean, None
    squares = sum((n * (value - mean)) ** 2 for value, n in parts)
    return mean, (squares * count / (count - 1)) ** 0.5 / tokens


def _results(training: Training) -> Record:
    last = training.curve[-1]
    on_gpu = training.device.type == "cuda"
    return {
        "parameters": training.trainee.net.num_parameters(),
        "tokens": last["tokens"], "seconds": last["seconds"],
        "tokens_per_second": last["tokens"] / last["seconds"],
        "warm_up_seconds": round(training.warm_up, 1),
        "curve": training.curve, "training": training.training,
        "memory": torch.cuda.max_memory_allocated() if on_gpu else None,
        "graph": training.graph, "compiled": training.compiled, "machine": facts(training.device),
        "devices": training.devices,
    }  # fmt: skip
