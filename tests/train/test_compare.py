"""The comparison of Hydra with BERT: whole, tiny, killed in the middle."""

import importlib.util
import json
import math
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import start, wait_until
from small_glue import write_glue
from small_text import sentences

from hydra_ssm.cli import main
from hydra_ssm.text import HydraForMaskedLM, preset
from hydra_ssm.text.collators import IGNORED, MaskedLMCollator
from hydra_ssm.text.tokenizer import train_tokenizer
from hydra_ssm.train import workers
from hydra_ssm.train.batches import Batch, Batches
from hydra_ssm.train.checkpoints import UNFINISHED
from hydra_ssm.train.comparison import Plan, command, compare, prepare
from hydra_ssm.train.comparison.baseline import FREQUENCIES, PLACE, without_context
from hydra_ssm.train.comparison.data import Data, plainly
from hydra_ssm.train.comparison.plan import MODELS, NORMS, Choice, Run, length_runs, rate_run, seconds_run, token_runs
from hydra_ssm.train.comparison.report import MARK, differences, elsewhere, table
from hydra_ssm.train.comparison.run import (
    POSITIONS,
    _model,
    _results,
    _training,
    all_finished,
    finished,
    longer,
    mean_of_parts,
    train,
)
from hydra_ssm.train.comparison.tuning import best, choices, edges, next_runs
from hydra_ssm.train.errors import UserError
from hydra_ssm.train.loop import Training, schedule
from hydra_ssm.train.records import write_json
from hydra_ssm.train.trainee import How, Trainee, make_optimizer, masked_loss
from hydra_ssm.train.workers import Until

AT = {model: Choice("post", 1e-3) for model in MODELS}
ROOT = Path(__file__).resolve().parent.parent.parent
TINY: dict[str, Any] = {
    "hydra": "hydra-tiny", "bert": "bert-tiny", "length": 16, "batch_tokens": 64, "rates": (3e-3, 1e-3),
    "norms": ("pre",), "further_rates": 1, "rate_tokens": 256, "tokens": 64 * 12, "seeds": (0, 1), "lengths": (16, 32),
    "length_tokens": 256, "evaluations": 3, "evaluation_tokens": 256, "tasks": ("RTE",), "task_seeds": (0,),
    "task_batch": 32, "save_after": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `prepare` makes of three texts and GLUE."""
    base = tmp_path_factory.mktemp("compare")
    for number, name in enumerate(("train", "books", "wikitext")):
        (base / f"{name}.txt").write_text(sentences(150 if number == 0 else 60, seed=number), encoding="utf-8")
    words = train_tokenizer([sentences(300), "a quick text good bad . \" ' , :"], 200)
    words.save_pretrained(base / "words")
    held_out = {name: [str(base / f"{name}.txt")] for name in ("books", "wikitext")}
    prepare(base / "data", [str(base / "train.txt")], held_out, str(base / "words"), str(write_glue(base / "glue", 64)))
    return base / "data"


@pytest.fixture(scope="module")
def data(folder: Path) -> Data:
    return Data(folder)


# ------------------------------------------------------------------------------------------------------------- data


def test_rows_are_consecutive_tokens_of_one_document_between_cls_and_sep(folder: Path, data: Data) -> None:
    words, rows = data.tokenizer, data.rows("train", 16)
    text = (folder.parent / "train.txt").read_text(encoding="utf-8")
    whole = words(text, add_special_tokens=False)["input_ids"]
    found = rows.take(np.arange(len(rows)))
    assert len(rows) == len(whole) // 14
    assert (found[:, 0] == words.cls_token_id).all()
    assert (found[:, -1] == words.sep_token_id).all()
    assert found[:, 1:-1].reshape(-1).tolist() == whole[: 14 * len(rows)]


def make(data: Data, rows: int, seed: int = 0, parts: int = 1) -> Batches:
    """Of rows of 16 tokens, 30 % of which are hidden."""
    return Batches(data.rows("train", 16), MaskedLMCollator(data.tokenizer, 0.3), rows, seed, parts)


def test_both_models_and_a_resumed_run_see_the_same_batches(data: Data) -> None:
    first, again, other = make(data, 4), make(data, 4), make(data, 4, seed=1)
    for step in (0, 5, 300):  # over several passes
        one, same, another = first[step][0], again[step][0], other[step][0]
        assert all(torch.equal(a, b) for a, b in zip(vars(one).values(), vars(same).values(), strict=True))
        assert not torch.equal(one.input_ids, another.input_ids)


def test_a_batch_in_parts_is_the_same_batch(data: Data) -> None:
    (whole,), parts = make(data, 8)[7], make(data, 8, parts=4)[7]
    assert len(parts) == 4
    assert torch.equal(torch.cat([part.input_ids for part in parts]), whole.input_ids)
    places = [part.places[part.labels != IGNORED] + 2 * 16 * number for number, part in enumerate(parts)]
    kept = whole.labels != IGNORED
    assert torch.equal(torch.cat(places), whole.places[kept])
    assert torch.equal(torch.cat([part.labels[part.labels != IGNORED] for part in parts]), whole.labels[kept])
    assert all(part.count == whole.count == kept.sum() for part in parts)


def test_a_pass_shows_every_row_once(data: Data) -> None:
    batches = make(data, 1)
    rows = batches.rows.take(np.arange(len(batches.rows)))
    seen = []
    for step in range(len(rows)):
        (batch,) = batches[step]
        tokens = batch.input_ids.flatten().clone()
        kept = batch.labels != IGNORED
        tokens[batch.places[kept]] = batch.labels[kept]
        seen.append(tokens.numpy())
    assert sorted(map(tuple, seen)) == sorted(map(tuple, rows))


def test_the_share_of_hidden_tokens_is_the_papers_in_training_and_in_evaluation(data: Data) -> None:
    batches = make(data, 64)
    share = np.mean([float((batches[i][0].labels != IGNORED).sum()) for i in range(20)]) / (1024 * 14 / 16)
    assert abs(share - 0.30) < 0.02
    inputs, labels = data.evaluation("books", 16, 1 << 14)
    assert abs(float((labels != IGNORED).float().mean()) / (14 / 16) - 0.15) < 0.03
    assert inputs.shape == labels.shape


def test_wikitext_is_read_as_others_write() -> None:
    assert plainly("weigh 0 @.@ 7 kg , <unk> @-@ like") == "weigh 0.7 kg , [UNK]-like"


# ------------------------------------------------------------------------------------------------------------- loop


def test_the_schedule_is_the_papers() -> None:
    values = [schedule(step, 1000) for step in range(1000)]
    assert max(values) == values[59] == 1  # 6 %
    assert values[0] == pytest.approx(1 / 60)
    assert values[-1] == pytest.approx(0.02)
    assert np.allclose(np.diff(values[60:]), -0.98 / 940)


def test_decay_is_decoupled_and_spares_norms_biases_and_decays() -> None:
    net = HydraForMaskedLM(preset("hydra-tiny", vocab_size=200, hidden_size=32, num_hidden_layers=1, headdim=16))
    rate = 2e-3
    optimizer = make_optimizer(net, rate, 1e-5 / rate, fused=False)
    names = {id(p): name for name, p in net.named_parameters()}
    decayed, free = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert decayed | free == set(names.values())
    assert all("bias" in n or "norm" in n or n.endswith(("A_log", ".D")) for n in free)
    assert not any("bias" in n or "norm" in n or n.endswith(("A_log", ".D")) for n in decayed)
    before = net.model.embeddings.word_embeddings.weight.detach().clone()
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after = net.model.embeddings.word_embeddings.weight
    assert torch.allclose(after.double(), before.double() * (1 - 1e-5), rtol=2e-7, atol=0)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.98)
    assert optimizer.param_groups[0]["eps"] == 1e-6


def test_the_loss_and_its_gradient_are_those_of_the_model(data: Data) -> None:
    config = preset(
        "hydra-tiny", vocab_size=208, hidden_size=32, num_hidden_layers=1, headdim=16, embedding_dropout=0.0
    )
    net = HydraForMaskedLM(config).double().train()
    (batch,) = make(data, 4)[0]
    labels = torch.full(batch.input_ids.shape, IGNORED).flatten()
    kept = batch.labels != IGNORED
    assert not kept.all()  # some places are no token's
    labels[batch.places[kept]] = batch.labels[kept]
    expected = net(input_ids=batch.input_ids, labels=labels.view_as(batch.input_ids)).loss
    wanted = torch.autograd.grad(expected, list(net.parameters()))
    trainee = Trainee(net, 1e-3, 0.01, 1.0, torch.device("cpu"), How(), print)
    trainee.warm_up(batch)
    trainee._forward_and_backward()
    assert trainee.found[0] == pytest.approx(float(expected.detach()), rel=1e-6)  # cross-entropy in float32
    for parameter, exact in zip(net.parameters(), wanted, strict=True):
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, exact, rtol=1e-5, atol=1e-7)


def test_a_step_in_parts_is_the_same_step(data: Data) -> None:
    after = []
    for parts in (1, 4):
        torch.manual_seed(0)
        config = preset(
            "hydra-tiny", vocab_size=208, hidden_size=32, num_hidden_layers=1, headdim=16, embedding_dropout=0.0
        )
        trainee = Trainee(HydraForMaskedLM(config).double(), 1e-3, 0.01, 1.0, torch.device("cpu"), How(), print)
        batches = make(data, 8, parts=parts)
        trainee.warm_up(batches[0][0])
        for step in range(3):
            trainee.step(batches[step], 1e-3, seed=step)
        after.append((trainee.means(3), [p.detach().clone() for p in trainee.net.parameters()]))
    (means, weights), (others, same) = after
    assert means == pytest.approx(others, rel=1e-5)
    for one, other in zip(weights, same, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)  # cross-entropy in float32


def test_what_is_hidden_nowhere_has_no_loss() -> None:
    loss, right = masked_loss(torch.randn(3, 5), torch.full((3,), IGNORED), torch.tensor(1.0))
    assert loss == right == 0


def test_longer_rows_repeat_the_positions_that_were_trained() -> None:
    net = HydraForMaskedLM(preset("bert-tiny", vocab_size=200))
    more = longer(net, 16, 40)
    table, old = (n.model.embeddings.position_embeddings.weight for n in (more, net))
    assert table.shape[0] == 40
    assert torch.equal(table[:16], old[:16])
    assert torch.equal(table[16:32], old[:16])
    assert torch.equal(table[32:], old[:8])
    ids = torch.randint(5, 200, (1, 16))
    assert torch.equal(more.eval()(ids).logits, net.eval()(ids).logits)
    plain = HydraForMaskedLM(preset("hydra-tiny", vocab_size=200, hidden_size=32, num_hidden_layers=1, headdim=16))
    assert longer(plain, 16, 40) is plain


# ------------------------------------------------------------------------------------------------------------- plan


def training(data: Data, run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Training:
    net = HydraForMaskedLM(preset("hydra-tiny", vocab_size=208, hidden_size=32, num_hidden_layers=1, headdim=16))
    monkeypatch.setattr("hydra_ssm.train.comparison.run._model", lambda *_: net)
    return _training(folder, run, Plan.of(TINY), data, folder, How(), lambda _: None)


def test_longer_rows_bring_batches_that_the_pretraining_has_not_had(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan.of(TINY)
    before, bert_before = token_runs(plan, AT, 0)
    after, bert_after = (run for run in length_runs(plan, AT, 0) if run.length == plan.length)
    runs = [training(data, run, tmp_path, monkeypatch) for run in (before, bert_before, after, bert_after)]
    first = [run.batches[0][0].input_ids for run in runs]
    assert torch.equal(first[0], first[1])
    assert torch.equal(first[2], first[3])
    assert not torch.equal(first[0], first[2])
    seeds = [run.course.seed for run in runs]  # of the dropout
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]


def test_both_models_get_the_same_budget() -> None:
    plan, chosen = Plan(), {"hydra": Choice("post", 1e-3), "bert": Choice("pre", 5e-4)}
    grid, tokens, lengths = next_runs(plan, []), token_runs(plan, chosen, 0), length_runs(plan, chosen, 0)
    for runs in (grid, tokens, lengths):
        halves = [[(r.steps, r.length, r.seed) for r in runs if r.model == model] for model in MODELS]
        assert halves[0] == halves[1]
    tried = [[(r.norm, r.rate) for r in grid if r.model == model] for model in MODELS]
    assert tried[0] == tried[1] == [(norm, rate) for norm in NORMS for rate in plan.rates]
    assert len({run.name for run in [*grid, *tokens, *lengths]}) == 12 + 2 + 8
    assert {(r.model, r.norm, r.rate) for r in tokens} == {("hydra", "post", 1e-3), ("bert", "pre", 5e-4)}
    assert {(r.model, r.rate) for r in lengths} == {("hydra", 5e-4), ("bert", 2.5e-4)}


def test_equal_seconds_give_the_faster_model_more_tokens() -> None:
    plan, chosen = Plan(tokens=16_384 * 1000), {"hydra": Choice("post", 1e-3), "bert": Choice("pre", 5e-4)}
    run = seconds_run(plan, chosen, 0, {"hydra": 30.0, "bert": 20.0})
    assert run == Run("seconds", "bert", 0, plan.length, 1500, "pre", 5e-4)


# ----------------------------------------------------------------------------------------------------------- tuning

GRID = Plan(rates=(1.0, 2.0, 4.0), further_rates=2)


def record(model: str, norm: str, rate: float, loss: float | None) -> dict[str, Any]:
    """Of a run that diverged, where it has no loss."""
    run = rate_run(GRID, model, norm, rate)
    found = {"diverged": "by step 1"} if loss is None else {"losses": {"books": loss, "wikitext": -loss}}
    return {"name": run.name, "stage": "rate", "model": model, "norm": norm, "rate": rate, **found}


def tried(least: dict[tuple[str, str], float], plan: Plan = GRID) -> list[dict[str, Any]]:
    """The records of all runs that are wanted, where each model and norm is best at the rate of `least`, else at 2."""
    records: list[dict[str, Any]] = []
    while runs := next_runs(plan, records):
        assert len(records) < 100
        for run in runs:
            loss = abs(math.log2(run.rate / least.get((run.model, run.norm), 2.0)))
            records.append(record(run.model, run.norm, run.rate, loss))
    return records


def rates_of(records: list[dict[str, Any]], model: str, norm: str) -> list[float]:
    return [r["rate"] for r in records if (r["model"], r["norm"]) == (model, norm)]


def test_what_is_known_without_context_is_what_counting_finds(tmp_path: Path) -> None:
    """On words in no order: the loss of the conditional frequencies, counted, of hidden tokens given those in place."""
    words, draw = train_tokenizer([sentences(300)], 60), np.random.default_rng(0)
    tokens = draw.choice(np.arange(5, 45), 400_000, p=draw.dirichlet(np.full(40, 0.3))).astype(np.uint16)
    for name in ("train", "books"):
        np.save(tmp_path / f"{name}.npy", tokens)
        np.save(tmp_path / f"{name}-ends.npy", np.array([len(tokens)]))
    words.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "data.json").write_text("{}")
    found = Data(tmp_path)
    inputs, labels = (t.numpy() for t in found.evaluation("books", 100))
    seen, hidden = inputs[labels != IGNORED], labels[labels != IGNORED]
    losses = without_context(found, "books", 100)
    for loss, given in ((losses[FREQUENCIES], np.zeros_like(seen)), (losses[PLACE], seen)):
        pairs = np.zeros((len(words), len(words)))
        np.add.at(pairs, (given, hidden), 1)
        counted = pairs / pairs.sum(1, keepdims=True).clip(1)
        assert loss == pytest.approx(-np.log(counted[given, hidden]).mean(), rel=0.02)
    assert losses[PLACE] < 0.95 * losses[FREQUENCIES]


def test_what_is_known_without_context_follows_from_how_tokens_are_hidden(tmp_path: Path) -> None:
    """Of a text with words that the training text lacks, beside one with many that the tokenizer does not know."""
    words, draw = train_tokenizer([sentences(300)], 60), np.random.default_rng(1)
    texts = {"train": draw.integers(5, 30, 90), "books": draw.integers(10, 45, 2000)}
    texts["train"][::2] = words.unk_token_id
    for name, tokens in texts.items():
        np.save(tmp_path / f"{name}.npy", tokens.astype(np.uint16))
        np.save(tmp_path / f"{name}-ends.npy", np.array([len(tokens)]))
    words.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "data.json").write_text("{}")
    ordinary = [word for word in range(len(words)) if word not in words.all_special_ids]
    counts = {word: 1 + int((texts["train"] == word).sum()) for word in ordinary}
    share = {word: count / sum(counts.values()) for word, count in counts.items()}

    def becomes(word: int, seen: int) -> float:
        if seen == words.mask_token_id:
            return 0.8
        return 0.1 / len(ordinary) + 0.1 * (word == seen)

    inputs, labels = (t.numpy() for t in Data(tmp_path).evaluation("books", 50))
    hidden = list(zip(labels[labels != IGNORED].tolist(), inputs[labels != IGNORED].tolist(), strict=True))
    alone = [
        share[word] * becomes(word, seen) / sum(share[other] * becomes(other, seen) for other in ordinary)
        for word, seen in hidden
    ]
    assert {seen == words.mask_token_id for _, seen in hidden} == {True, False}
    losses = without_context(Data(tmp_path), "books", 50)
    assert losses[FREQUENCIES] == pytest.approx(-np.mean([math.log(share[word]) for word, _ in hidden]), rel=1e-12)
    assert losses[PLACE] == pytest.approx(-np.mean(np.log(alone)), rel=1e-12)


def test_a_best_rate_at_the_end_has_further_ones_beyond_it_for_both_models_and_norms_alike() -> None:
    for case in ((model, norm) for model in MODELS for norm in NORMS):
        for least, wanted in ((8.0, [8.0, 16.0]), (99.0, [8.0, 16.0]), (0.5, [0.5, 0.25]), (1.0, [0.5]), (2.0, [])):
            records = tried({case: least})
            assert rates_of(records, *case) == [1.0, 2.0, 4.0, *wanted]
            others = [(m, n) for m in MODELS for n in NORMS if (m, n) != case]
            assert all(rates_of(records, *other) == [1.0, 2.0, 4.0] for other in others)


def test_what_diverged_is_worse_than_all_else() -> None:
    records = [record("bert", "post", rate, loss) for rate, loss in ((1.0, 9.0), (2.0, None), (4.0, None))]
    wanted = [run for run in next_runs(GRID, records) if (run.model, run.norm) == ("bert", "post")]
    assert [run.rate for run in wanted] == [0.5]
    assert best(records, "bert", NORMS) == Choice("post", 1.0)
    with pytest.raises(UserError, match="hydra must learn at one of the rates"):
        choices(GRID, records)
    lost = [record("bert", "post", rate, None) for rate in (1.0, 2.0, 4.0)]
    assert [run.rate for run in next_runs(GRID, lost) if (run.model, run.norm) == ("bert", "post")] == [0.5]
    lost += [record("bert", "post", rate, None) for rate in (0.5, 0.25)]
    assert not edges(replace(GRID, norms=("post",)), lost)


def test_a_single_rate_is_not_tuned() -> None:
    plan = Plan(rates=(1.0,), norms=("pre",))
    records = [record(run.model, run.norm, run.rate, 3.0) for run in next_runs(plan, [])]
    assert [(r["model"], r["norm"]) for r in records] == [("hydra", "pre"), ("bert", "pre")]
    assert next_runs(plan, records) == []
    assert edges(plan, records)[0] == "1 is the only rate that hydra tried with pre-norm."


def test_norm_and_rate_are_those_of_the_least_loss_on_books() -> None:
    records = tried({("hydra", "pre"): 4.0}) + tried({("bert", "post"): 1.0})
    for r in records:
        if (r["model"], r["norm"], r["rate"]) in (("hydra", "pre", 4.0), ("bert", "post", 1.0)):
            r["losses"] = {"books": -1.0, "wikitext": 9.0}
    assert choices(GRID, records) == {"hydra": Choice("pre", 4.0), "bert": Choice("post", 1.0)}
    assert best(records, "hydra", ("post",)) == Choice("post", 2.0)
    alike = [record("bert", norm, rate, 3.0) for rate in (2.0, 1.0) for norm in NORMS]
    assert best(alike, "bert", NORMS) == best(alike[::-1], "bert", NORMS) == Choice("post", 1.0)


def test_a_best_rate_that_is_still_at_the_end_is_said() -> None:
    assert edges(GRID, tried({})) == []
    assert edges(GRID, tried({("bert", "post"): 0.5})) == []  # a lower one was tried, which is worse
    lowest = tried({("bert", "post"): 0.1})
    said = "The best rate of bert with post-norm, 0.25, is the lowest that was tried: a lower one may be better."
    assert edges(GRID, lowest) == [said]
    assert edges(GRID, [r for r in lowest if r["rate"] != 0.25]) == []  # which is still to be tried
    said = "The best rate of hydra with pre-norm, 16, is the highest that was tried: a higher one may be better."
    assert edges(GRID, tried({("hydra", "pre"): 99.0})) == [said]


def test_the_models_have_the_norm_of_their_run(data: Data, tmp_path: Path) -> None:
    plan = Plan.of(TINY)
    for model in MODELS:
        nets = [_model(tmp_path, rate_run(plan, model, norm, 1e-3), plan, data) for norm in NORMS]
        assert [net.config.norm for net in nets] == ["post", "pre"]
        more = 2 * nets[0].config.hidden_size  # its last norm
        assert nets[1].num_parameters() == nets[0].num_parameters() + more


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_tokens": 100}, "divide batch_tokens = 100"),
        ({"tokens": 5}, "tokens must be at least batch_tokens"),
        ({"mask_rate": 0.0}, "mask_rate must be above 0"),
        ({"epochs": 3}, "no setting epochs"),
        ({"seeds": (0, -1)}, r"seeds must be at least 0 and below 1000000, got \(0, -1\)"),
        ({"seeds": (1_000_000,)}, r"seeds must be at least 0 and below 1000000, got \(1000000,\)"),
        ({"norms": ("post", "none")}, r"norms must be of post, pre, at least one, got \('post', 'none'\)"),
        ({"further_rates": -1}, "further_rates must be at least 0, got -1"),
        ({"task_seeds": (-1,)}, r"seeds must be at least 0 and below 1000000, got .* and \(-1,\)"),
    ],
)
def test_a_wrong_plan_says_so(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Plan.of(given)


# ----------------------------------------------------------------------------------------------------------- report


def test_runs_on_another_device_are_named() -> None:
    def run(name: str, *devices: str) -> dict[str, Any]:
        return {"name": name, "devices": list(devices)}

    runs = [run("a", "H100"), run("b", "H100"), run("c", "H100", "H200"), run("d", "H200")]
    found = elsewhere({"runs": [*runs, {"name": "e", "diverged": "by step 1"}]})
    assert found == {"c": ["H100", "H200"], "d": ["H200"]}
    assert elsewhere({"runs": runs[:2]}) == {}
    assert elsewhere({"runs": [run("a", "H100", "H200"), run("b", "H100", "H200"), run("c", "H100")]}).keys() == set(
        "abc"
    )


def test_a_run_that_goes_on_elsewhere_and_without_a_graph_says_so(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = token_runs(Plan.of(TINY), AT, 0)[0]
    over = Until(threading.Event(), 0.0)
    warm_up, known = Trainee.warm_up, []
    for name, fast in (("first", True), ("second", False), ("second", True)):
        monkeypatch.setattr("hydra_ssm.train.loop.device_name", lambda _, name=name: name)

        def begin(self: Trainee, batch: Batch, fast: bool = fast) -> None:
            warm_up(self, batch)
            self.graph = self.compiled = fast

        monkeypatch.setattr(Trainee, "warm_up", begin)
        last = training(data, run, tmp_path, monkeypatch)
        assert not last.fit(over)
        last.curve[-1]["seconds"] = 1.0  # it was evaluated before the first step alone
        known.append(_results(last))
    assert last.done == 3
    assert [found["devices"] for found in known] == [["first"], ["first", "second"], ["first", "second"]]
    for name in ("graph", "compiled"):
        assert [found[name] for found in known] == [True, False, False]


def test_the_standard_error_of_a_loss_is_that_of_drawing_its_parts() -> None:
    rows = np.random.default_rng(0).normal(3.0, 0.2, (2000, 32))
    found = [mean_of_parts([(float(value), 100) for value in row]) for row in rows]
    means, errors = np.array(found).T
    assert np.sqrt((errors**2).mean()) == pytest.approx(means.std(), rel=0.05)
    assert mean_of_parts([(1.0, 1), (4.0, 3)])[0] == 13 / 4
    assert mean_of_parts([(1.0, 5)]) == (1.0, None)
    assert mean_of_parts([(1.0, 5), (3.0, 5)]) == (2.0, pytest.approx(np.std([1, 3], ddof=1) / 2**0.5))


# ------------------------------------------------------------------------------------------------------------ whole


def test_a_run_that_is_stopped_while_all_text_is_scored_is_scored_when_it_goes_on(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, how = Plan(**TINY), How()
    run, fit = token_runs(plan, AT, 0)[0], Training.fit
    never = Until(threading.Event(), math.inf)
    whole = train(tmp_path / "whole", run, plan, data, never, how, lambda _: None)
    asked = threading.Event()
    monkeypatch.setattr(Training, "fit", lambda self, until: (fit(self, until), asked.set())[0])
    assert train(tmp_path / "stopped", run, plan, data, Until(asked, math.inf), how, lambda _: None) is None
    again = train(tmp_path / "stopped", run, plan, data, never, how, lambda _: None)
    assert whole is not None
    assert again is not None
    assert [again[name] for name in ("losses", "parts", "training")] == [
        whole[name] for name in ("losses", "parts", "training")
    ]
    assert len(again["curve"]) == len(whole["curve"])


@pytest.mark.slow
@pytest.mark.usefixtures("warm_processes")
def test_a_killed_comparison_goes_on_as_if_nothing_had_been(folder: Path, tmp_path: Path) -> None:
    whole = compare(folder, tmp_path / "whole", say=lambda _: None, **TINY, stages=("tokens",))
    killed = tmp_path / "killed"
    process = start(compare, folder, killed, **TINY, stages=("tokens",))
    wait_until(lambda: [*killed.glob("checkpoints/tokens-hydra-seed-0/checkpoint-*")], process)
    process.kill()
    process.join()
    assert not (killed / "runs" / "tokens-bert-seed-0.json").exists()
    with pytest.raises(UserError, match=r"seeds is \(0, 1\) in the comparison in .*killed, got \(0,\): choose another"):
        compare(folder, killed, say=lambda _: None, **TINY | {"seeds": [0]})
    again = compare(folder, killed, say=lambda _: None)  # with the settings that it has, and all parts
    assert again["unfinished"] == []
    assert {run["name"] for run in whole["runs"]} < {run["name"] for run in again["runs"]}
    by_name = {run["name"]: run for run in again["runs"]}
    for run in whole["runs"]:
        other = by_name[run["name"]]
        for point, same in zip(run["curve"], other["curve"], strict=True):
            assert {k: v for k, v in point.items() if k != "seconds"} == {
                k: v for k, v in same.items() if k != "seconds"
            }
        assert run["training"] == other["training"]
    _check_parts(again, killed)
    _check_figures(again, tmp_path)


@pytest.mark.usefixtures("warm_processes")
def test_several_gpus_have_a_run_each_and_find_what_one_finds(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = TINY | {"norms": NORMS, "rates": (1e-3,), "rate_tokens": 64, "tokens": 128, "seeds": (0, 1)}
    stages = ("tokens", "seeds")
    one = compare(folder, tmp_path / "one", say=lambda _: None, stages=stages, **settings)
    asked: list[int] = []
    monkeypatch.setattr(command, "gpus", lambda: ["0", "1"])
    monkeypatch.setattr(command, "together", lambda *given: asked.append(given[2]) or workers.together(*given))
    monkeypatch.setattr(command, "train", None)  # nothing here
    two = compare(folder, tmp_path / "two", say=lambda _: None, stages=stages, **settings)
    assert asked == [2, 2, 2]  # rates, both models, both models of another seed
    assert two["unfinished"] == []
    for a, b in zip(one["runs"], two["runs"], strict=True):
        assert (a["name"], a["training"], a["losses"]) == (b["name"], b["training"], b["losses"])
    _check_tuning(one, "\n".join(_figures().rates(one)))


def test_a_record_that_a_kill_left_half_written_is_none_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    for name, text in (("one", '{"name": "one"}'), (f"{UNFINISHED}two", '{"name'), (f"{UNFINISHED}one", "{}")):
        (tmp_path / "runs").mkdir(exist_ok=True)
        (tmp_path / "runs" / f"{name}.json").write_text(text, encoding="utf-8")
    assert [record["name"] for record in all_finished(tmp_path)] == ["one"]
    (tmp_path / "runs" / "three.json").write_text('{"name', encoding="utf-8")
    with pytest.raises(UserError, match=r"three.json is damaged \(Unterminated string.*: remove it, and what it tells"):
        all_finished(tmp_path)
    with pytest.raises(UserError, match=r"three.json is damaged"):
        finished(tmp_path, "three")


def test_records_of_an_earlier_version_are_of_post_norm(tmp_path: Path) -> None:
    old = record("bert", "post", 1.0, 3.0)
    del old["norm"]
    write_json(tmp_path / "runs" / f"{old['name']}.json", old)
    assert old["name"] == "rate-bert-1"
    assert all_finished(tmp_path) == [finished(tmp_path, old["name"])] == [old | {"norm": "post"}]
    assert finished(tmp_path, "rate-bert-pre-1") is None


def test_a_lost_model_is_told(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    settings = TINY | {"rates": (1e-3,), "rate_tokens": 64, "tokens": 64, "seeds": (0,)}
    compare(folder, tmp_path, say=said.append, stages=("tokens",), **settings)
    (tmp_path / "models" / "tokens-bert-seed-0").rename(tmp_path / "elsewhere")
    report = compare(folder, tmp_path, say=said.append)
    assert report["unfinished"] == ["tasks", "lengths"]
    assert any("the model of tokens-bert-seed-0 is missing" in line for line in said)
    assert any(run["stage"] == "seconds" for run in report["runs"])  # which needs none
    saved = HydraForMaskedLM.from_pretrained(tmp_path / "elsewhere")
    places = saved.state_dict()[POSITIONS]  # tasks read more than the rows had
    assert len(places) == saved.config.max_position_embeddings > TINY["length"]
    assert torch.equal(places[: TINY["length"]], places[TINY["length"] : 2 * TINY["length"]])


def test_what_another_machine_has_finished_is_not_done_again(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    there, here = tmp_path / "there", tmp_path / "here"
    settings = TINY | {"rates": (1e-3,), "rate_tokens": 64, "tokens": 64, "lengths": (32,), "length_tokens": 64}
    first = compare(folder, there, say=said.append, stages=("tokens", "tasks"), **settings)
    assert first["unfinished"] == []
    source = there / "comparison.json"
    found = compare(folder, here, say=said.append, records=source)  # with the plan that it has
    assert found["unfinished"] == []
    assert found["glue"] == first["glue"]
    runs = {run["name"]: run for run in found["runs"]}
    for run in first["runs"]:
        assert runs[run["name"]] == run
    assert not (here / "models" / "tokens-hydra-seed-0").exists()  # which is there
    longer_rows = [run for run in runs.values() if run["stage"] == "length"]
    assert {(run["model"], run["start"]) for run in longer_rows} == {(m, f"tokens-{m}-seed-1") for m in MODELS}
    (here / "models").rename(tmp_path / "elsewhere")
    assert compare(folder, here, say=said.append)["runs"] == found["runs"]  # which is whole without the models


def test_records_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    settings = TINY | {"rates": (1e-3,), "rate_tokens": 64, "tokens": 64, "seeds": (0,)}
    report = compare(folder, tmp_path / "there", say=lambda _: None, limit=0, **settings)
    for changed, message in (
        ([], "must be the comparison.json of a comparison"),
        ({"plan": {}}, "must be the comparison.json of a comparison, it lacks 'data'"),
        (report | {"data": report["data"] | {"texts": {"train": {"tokens": 5}}}}, "must be of the same data, it is of"),
        (report | {"plan": report["plan"] | {"tokens": 128}}, "tokens is 64 in the comparison in .*there, got 128"),
    ):
        write_json(tmp_path / "other.json", changed)
        with pytest.raises(UserError, match=message):
            compare(folder, tmp_path / "there", say=lambda _: None, records=tmp_path / "other.json")
    with pytest.raises(UserError, match=r"nothing.json is not there"):
        compare(folder, tmp_path / "new", say=lambda _: None, records=tmp_path / "nothing.json")
    assert not (tmp_path / "new").exists()


def test_equal_seconds_are_of_one_device(folder: Path, tmp_path: Path) -> None:
    def devices(**given: list[str]) -> None:
        for model, names in given.items():
            file = tmp_path / "runs" / f"tokens-{model}-seed-0.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"devices": names}))

    said: list[str] = []
    settings = TINY | {"rates": (1e-3,), "rate_tokens": 64, "tokens": 64, "seeds": (0,)}
    report = compare(folder, tmp_path, say=said.append, stages=("tokens",), **settings)
    (here,) = report["runs"][0]["devices"]
    for hydra, bert, reason in (
        (["H100"], ["H200"], "hydra was trained on H100, bert was trained on H200"),
        (["H100"], ["H100", "H200"], "hydra was trained on H100, bert was trained on H100 and H200"),
        (["H100"], ["H100"], f"both models were trained on H100, this is {here}"),
    ):
        devices(hydra=hydra, bert=bert)
        report = compare(folder, tmp_path, say=said.append, stages=("seconds",))
        assert not any(run["stage"] == "seconds" for run in report["runs"])
        assert [reason in left for left in report["unfinished"]] == [True]
        assert any(line.startswith(f"seconds: {reason}") for line in said)
    devices(hydra=[here], bert=[here])
    report = compare(folder, tmp_path, say=said.append, stages=("seconds",))
    assert report["unfinished"] == []
    assert any(run["stage"] == "seconds" for run in report["runs"])


def _check_parts(report: dict[str, Any], out: Path) -> None:
    stages = {(run["stage"], run["model"]) for run in report["runs"]}
    assert {(stage, model) for stage in ("rate", "tokens", "length") for model in MODELS} <= stages
    assert any(stage == "seconds" for stage, _ in stages)
    _check_scores(report)
    tokens = {run["model"]: run for run in report["runs"] if run["name"].startswith("tokens") and run["seed"] == 0}
    assert tokens["hydra"]["tokens"] == tokens["bert"]["tokens"] == TINY["tokens"]
    more = next(run for run in report["runs"] if run["stage"] == "seconds")
    slow = max(run["seconds"] for run in tokens.values())
    assert more["steps"] == math.floor(12 * slow / tokens[more["model"]]["seconds"])
    for model in MODELS:
        assert report["glue"][model]["tasks"]["RTE"]["seeds"] == [0]
        assert report["glue"][model]["average"]["tasks"] == 1
        own = [s for s in report["summary"] if s["stage"] == "tokens" and s["model"] == model]
        assert own[0]["seeds"] == [0, 1]
        assert own[0]["books_loss"]["spread"] > 0
    assert json.loads((out / "comparison.json").read_text())["runs"] == report["runs"]
    assert (out / "comparison_curves.png").stat().st_size > 5000
    assert (out / "comparison_lengths.png").stat().st_size > 5000
    assert not list((out / "checkpoints").iterdir())


def _check_scores(report: dict[str, Any]) -> None:
    """The end of a run is scored on all of the text, the way to it on a part."""
    for run in report["runs"]:
        assert run["devices"] == [run["machine"]["device"]]
        for text in ("books", "wikitext"):
            on_the_way = run["curve"][-1][f"{text}_loss"]
            if run["stage"] == "length":  # what was known before is of all of it, too
                assert run["losses"][text] == pytest.approx(on_the_way, rel=1e-5)
                assert len(run["curve"]) == 2
            else:
                assert run["losses"][text] != pytest.approx(on_the_way, rel=1e-5)
                assert run["losses"][text] == pytest.approx(on_the_way, rel=0.15)
            hidden = sum(count for _, count in run["parts"][text])
            assert hidden == pytest.approx(0.15 * report["data"]["texts"][text]["tokens"], rel=0.3)
            assert 0 < run["errors"][text] < 0.5
    found = differences(report)
    assert [(d["stage"], d["length"], d["seed"]) for d in found] == [
        ("tokens", 16, 0), ("tokens", 16, 1), ("length", 16, 0), ("length", 32, 0)
    ]  # fmt: skip
    losses = {(r["model"], r["stage"], r["seed"]): r["losses"]["books"] for r in report["runs"]}
    assert found[1]["books"][0] == pytest.approx(losses["hydra", "tokens", 1] - losses["bert", "tokens", 1])


def _figures() -> Any:
    """The module that writes the page."""
    spec = importlib.util.spec_from_file_location("comparison_figures", ROOT / "docs" / "comparison_figures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _check_tuning(report: dict[str, Any], text: str) -> None:
    """The whole grid is shown, what was taken is told, and the other runs have it."""
    plan, runs = Plan.of(report["plan"]), report["runs"]
    columns = " | ".join(f"{model}, {norm}-norm" for model in MODELS for norm in plan.norms)
    assert f"| peak | {columns} |" in text
    assert next_runs(plan, runs) == []
    chosen = choices(plan, runs)
    for run in runs:
        if run["stage"] == "rate":
            taken = chosen[run["model"]] == (run["norm"], run["rate"])
            cell = f"{run['losses']['books']:.3f}"
            assert f"| **{cell}** |" in text if taken else f"| {cell} |" in text
        elif run["stage"] == "tokens":
            assert (run["norm"], run["rate"]) == chosen[run["model"]]
    for what in (FREQUENCIES, PLACE):
        books, wikitext = (report["without_context"][text][what] for text in ("books", "wikitext"))
        assert f"| without context, from {what} | {books:.3f} |" in text
        assert f"without context, from {what}: loss books {books:.3f}, wikitext {wikitext:.3f}" in table(report)
    lines = text.replace("\n", " ")
    assert all(line in lines for line in edges(plan, runs))
    for model, (norm, rate) in chosen.items():
        assert f"{model} goes on with {norm}-norm at {rate:g}" in lines
        paper = f"{norm}-norm at {rate:g}; its paper's form, post-norm, reached"
        assert (paper in lines) == (norm != "post" and "post" in plan.norms)


def _check_figures(report: dict[str, Any], pictures: Path) -> None:
    """Every number of the page comes from the report."""
    module = _figures()
    text = "\n".join(module.figures(report, pictures))
    for summary in report["summary"]:
        assert f"{summary['books_loss']['mean']:.3f}" in text
        assert f"{100 * summary['wikitext_accuracy']['mean']:.1f}" in text
    for found in differences(report):
        assert f"| {found['length']} | {found['seed']} | {found['books'][0]:+.3f} ± {found['books'][1]:.3f} |" in text
    _check_tuning(report, text)
    for line in (
        "What these figures do not say",
        "none was chosen for BERT",
        "have one seed",
    ):
        assert line in text.replace("\n", " ")
    moved = {**report, "runs": [{**report["runs"][0], "devices": ["one", "another"]}, *report["runs"][1:]]}
    name = moved["runs"][0]["name"]
    assert f"{MARK} {name} ran on one, then another" in "\n".join(module.figures(moved, pictures)).replace("\n", " ")
    assert f"{MARK} not on the device of most: {name} on one, then another" in table(moved)
    assert MARK not in text + table(report)
    for model in MODELS:
        assert f"| {model} | {report['glue'][model]['tasks']['RTE']['mean']:.1f} |" in text
    page = f"before\n{module.BEGIN}\n\nold\n\n{module.END}\nafter\n"
    once = module.insert(page, ["new", ""])
    assert once == module.insert(once, ["new", ""])
    assert "old" not in once
    assert once.endswith("after\n")
    assert "comparison_curves.png" in text
    assert (pictures / "comparison_lengths.png").exists()


def test_the_command_takes_settings_and_goes_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", str(folder), "--out", str(tmp_path / "out"), "--limit", "0"]
    small = ["--tokens", "640", "--batch-tokens", "64", "--length", "16", "--lengths", "16", "32", "--rates", "0.001"]
    assert main([*words, *small]) == 0
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["tokens"] == 640
    assert main(words) == 0
    assert main([*words, "--tokens", "1280"]) == 2
    assert "tokens is 640 in the comparison" in capsys.readouterr().err


def test_the_command_prepares(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, out = folder.parent, tmp_path / "data"
    given = [f"--{name} {base / name}.txt".split() for name in ("train", "books", "wikitext")]
    words = [word for pair in given for word in pair]
    assert (
        main(["compare", "prepare", str(out), *words, "--tokenizer", str(base / "words"), "--glue", str(base / "glue")])
        == 0
    )
    assert {p.name: p.read_bytes() for p in out.glob("*.npy")} == {p.name: p.read_bytes() for p in folder.glob("*.npy")}
    assert "RTE" in capsys.readouterr().out


def test_what_is_held_out_must_not_be_trained_on(folder: Path, tmp_path: Path) -> None:
    train, words = str(folder.parent / "train.txt"), str(folder.parent / "words")
    with pytest.raises(UserError, match="must not be trained on"):
        prepare(tmp_path / "data", [train], {"books": [train], "wikitext": [train]}, words, None)


def test_a_comparison_without_time_keeps_its_place(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    report = compare(folder, tmp_path / "none", limit=0, say=said.append, **TINY)
    assert report["runs"] == []
    assert "the same command goes on" in said[-2]
    with pytest.raises(UserError, match="tokens is 768 in the comparison"):
        compare(folder, tmp_path / "none", limit=0, say=said.append, tokens=640)


def test_damaged_data_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is missing"):
        compare(tmp_path, tmp_path / "out", limit=0)
