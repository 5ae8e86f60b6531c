"""Put the figures of the comparison with BERT into docs/results.md, and its curves into docs/pictures.

    python docs/comparison_figures.py [FILE]

Reads what `hydra-ssm compare` wrote, by default results/comparison.json.
"""

from __future__ import annotations

import json
import math
import sys
import textwrap
from pathlib import Path
from typing import Any

from hydra_ssm.train.comparison.plan import MODELS, NORMS, TEXTS, Choice, Plan
from hydra_ssm.train.comparison.report import MARK, differences, draw_curves, draw_lengths, elsewhere
from hydra_ssm.train.comparison.tuning import best, edges, scores
from hydra_ssm.train.finetune.tasks import TASKS

DOCS = Path(__file__).parent
PAGE = DOCS / "results.md"
BEGIN = "<!-- comparison: docs/comparison_figures.py writes what follows -->"
END = "<!-- end of comparison -->"
NONE = "-"

Report = dict[str, Any]
Summary = dict[str, Any]


def with_spread(value: dict[str, float | None] | None, form: str, scale: float = 1) -> str:
    """A mean and its spread, where they are known."""
    if value is None or value["mean"] is None:
        return NONE
    spread = "" if value["spread"] is None else f" ± {scale * value['spread']:{form}}"
    return f"{scale * value['mean']:{form}}{spread}"


def quality(summary: Summary) -> list[str]:
    """Loss and accuracy of both texts."""
    return [
        cell
        for text in TEXTS
        for cell in (
            with_spread(summary[f"{text}_loss"], ".3f"), with_spread(summary[f"{text}_accuracy"], ".1f", 100)
        )
    ]  # fmt: skip


def rows(header: list[str], body: list[list[str]]) -> list[str]:
    """A table."""
    lines = [header, ["---"] * len(header), *body]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def about(report: Report) -> list[str]:
    """What was compared, where and when."""
    plan, run = report["plan"], report["runs"][0]
    machine = run["machine"]
    parameters = {s["model"]: s["parameters"] for s in report["summary"] if s["stage"] == "tokens"}
    sizes = " and ".join(f"{plan[model]} ({count:,} parameters)" for model, count in parameters.items())
    others = elsewhere(report)
    usual = next((r["devices"] for r in report["runs"] if r["name"] not in others and "devices" in r), [])
    how = [word for word, used in (("CUDA graphs", run["graph"]), ("compiled layers", run["compiled"])) if used]
    text = (
        f"{report['date']}; {sizes}; {plan['tokens']:,} tokens in rows of {plan['length']}, {plan['batch_tokens']:,} a "
        f"step, {plan['tokens'] / report['data']['texts']['train']['tokens']:.1f} passes over the text; seeds "
        f"{', '.join(map(str, plan['seeds']))}. {' and '.join(usual)}, torch {machine['torch']}, "
        f"{' and '.join(how) or 'called from Python'} for both. Means and standard deviations over seeds, where there "
        "are several. Losses and accuracies are of all the held-out text."
    )
    left = [f"Not finished: {', '.join(report['unfinished'])}."] if report["unfinished"] else []
    mixed = [
        f"{MARK} {name} ran on {', then '.join(on)}, so that its times do not compare." for name, on in others.items()
    ]
    return [*filled(" ".join([text, *left, *mixed])), ""]


def filled(text: str, first: str = "") -> list[str]:
    """Text in lines, of an item of a list where `first` begins one."""
    return textwrap.wrap(
        text, 120, initial_indent=first, subsequent_indent=" " * len(first), break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def marked(report: Report, summary: Summary) -> str:
    """The speed of runs, marked where one was not on the device of the others."""
    own = {
        run["name"]
        for run in report["runs"]
        if all(run[name] == summary[name] for name in ("stage", "model", "length"))
    }
    return with_spread(summary["tokens_per_second"], ",.0f") + MARK * bool(own & elsewhere(report).keys())


def rates(report: Report) -> list[str]:
    """All that was tried, and what was taken."""
    plan, runs = Plan.of(report["plan"]), report["runs"]
    columns = [(model, norm) for model in MODELS for norm in plan.norms]
    tried = {column: scores(runs, *column) for column in columns}
    taken = {model: best(runs, model, plan.norms) for model in MODELS}

    def cell(model: str, norm: str, rate: float) -> str:
        score = tried[model, norm].get(rate)
        text = NONE if score is None else f"{-score:.3f}" if math.isfinite(score) else "diverged"
        return f"**{text}**" if taken[model] == Choice(norm, rate) else text

    body = [
        [f"{rate:g}", *(cell(*column, rate) for column in columns)]
        for rate in sorted({rate for found in tried.values() for rate in found})
    ]
    for what, loss in report["without_context"][TEXTS[0]].items():
        body.append([f"without context, from {what}", *[f"{loss:.3f}"] * len(columns)])
    title = f"### Norm and learning rate: held-out loss on books after {plan.rate_tokens:,} tokens"
    header = ["peak", *(f"{model}, {norm}-norm" for model, norm in columns)]
    return [title, "", *rows(header, body), *filled(" ".join([*chosen(plan, runs), *edges(plan, runs)])), ""]


def chosen(plan: Plan, runs: list[Report]) -> list[str]:
    """What each model goes on with, and what its paper's form reached where that is another."""
    found, paper = [], NORMS[0]
    for model in MODELS:
        choice = best(runs, model, plan.norms)
        if choice is None:
            continue
        text = f"{model} goes on with {choice.norm}-norm at {choice.rate:g}"
        own = best(runs, model, (paper,))
        if own is not None and choice.norm != paper:
            losses = [-scores(runs, model, c.norm)[c.rate] for c in (own, choice)]
            text += (
                f"; its paper's form, {paper}-norm, reached {losses[0]:.3f} at {own.rate:g}, against {losses[1]:.3f}"
            )
        found.append(f"{text}.")
    return found


def pretrained(report: Report) -> list[str]:
    """Equal tokens and equal seconds."""
    body = []
    for stage, what in (("tokens", "the same tokens"), ("seconds", "the same seconds")):
        for s in (s for s in report["summary"] if s["stage"] == stage):
            speed = marked(report, s)
            tokens, seconds = f"{s['tokens']['mean']:,.0f}", with_spread(s["seconds"], ".1f")
            body.append(
                [
                    f"{s['model']}, {what}",
                    s["norm"],
                    f"{s['rate']:g}",
                    tokens,
                    seconds,
                    speed,
                    *quality(s),
                    str(len(s["seeds"])),
                ]
            )
    header = [
        "", "norm", "rate", "tokens", "seconds", "tokens/s", "books loss", "acc. %", "WikiText loss", "acc. %", "seeds",
    ]  # fmt: skip
    return ["### At equal tokens, and at equal seconds", "", *rows(header, body), *between(report, "tokens")]


def between(report: Report, stage: str) -> list[str]:
    """Hydra minus BERT."""
    body = [
        [f"{d['length']:,}", str(d["seed"]), *(with_error(*d[text]) for text in TEXTS)]
        for d in differences(report)
        if d["stage"] == stage
    ]
    text = "Hydra's loss minus BERT's, on the same hidden tokens, ± its standard error over parts of the text:"
    return [text, "", *rows(["length", "seed", "books", "WikiText"], body)] if body else []


def with_error(value: float, error: float | None) -> str:
    """A difference and its standard error."""
    return f"{value:+.3f}" + ("" if error is None else f" ± {error:.3f}")


def tasks(report: Report) -> list[str]:
    """GLUE."""
    glue = report["glue"]
    if not glue:
        return []
    names = [name for name in TASKS if any(name in found["tasks"] for found in glue.values())]
    body = [
        [model, *(with_spread(found["tasks"].get(name), ".1f") for name in names), with_spread(found["average"], ".1f")]
        for model, found in glue.items()
    ]
    seeds = len(report["plan"]["task_seeds"])
    title = f"### GLUE's whole tasks, {seeds} seeds of fine-tuning of each model of the first seed"
    return [title, "", *rows(["", *names, "average"], body)]


def lengths(report: Report) -> list[str]:
    """Longer rows."""
    own = [s for s in report["summary"] if s["stage"] == "length"]
    if not own:
        return []
    body = []
    for s in sorted(own, key=lambda s: (s["length"], MODELS.index(s["model"]))):
        run = next(r for r in report["runs"] if r["name"] == f"length-{s['model']}-{s['length']}")
        before = [f"{run['curve'][0][f'{text}_loss']:.3f}" for text in TEXTS]
        cells = [f"{s['length']:,}", s["model"], *before, *quality(s), marked(report, s)]
        body.append(cells)
    header = [
        "length", "", "books loss before", "WikiText loss before", "books loss", "acc. %", "WikiText loss", "acc. %",
        "tokens/s",
    ]  # fmt: skip
    title = f"### Longer rows: {report['plan']['length_tokens']:,} more tokens at each length"
    return [title, "", *rows(header, body), *between(report, "length")]


def caveats(report: Report) -> list[str]:
    """What the figures do not say."""
    plan, summary = report["plan"], report["summary"]
    known = {s["model"]: s["parameters"] for s in summary if s["stage"] == "tokens"}
    errors = [s[f"{text}_error"] for s in summary for text in TEXTS if s[f"{text}_error"]]
    exact = f"{max(errors):.3f} nats at most" if errors else "unknown"
    passes = plan["tokens"] / report["data"]["texts"]["train"]["tokens"]
    found = [
        f"A loss has a standard error from the text that happens to be held out ({exact}), which no spread over seeds "
        "contains. It is nearly the same for both models at one length, so that their difference is known better; "
        "between lengths it is not, as rows and hidden tokens differ.",
        "Norm and learning rate are chosen by the loss on the books that are reported, after "
        f"{plan['rate_tokens']:,} tokens with one seed: a longer training may want others.",
        f"Dropout is the recipe's: BERT's 0.1 in every layer, Hydra's on the embeddings alone. Over {passes:.1f} "
        "passes over the text that is a difference in regularisation, too.",
    ]
    if report["glue"]:
        found.append(
            "GLUE's spread is that of fine-tuning one pretrained model: of another pretraining nothing is known. Its "
            "learning rates are those of the paper, chosen for Hydra; none was chosen for BERT."
        )
    lengths = [s for s in summary if s["stage"] == "length"]
    if lengths:
        found.append("Longer rows have one seed. Rows and hidden tokens are not those of the pretraining.")
    for model in MODELS:
        longer = ((s, s["parameters"] - known.get(model, s["parameters"])) for s in lengths if s["model"] == model)
        if more := [f"{count:,} at {s['length']:,}" for s, count in longer if count > 0]:
            found.append(
                f"{model} has more parameters in longer rows, {' and '.join(more)}: learned positions, which begin as "
                "repeats of those that were trained."
            )
    return ["### What these figures do not say", "", *(line for text in found for line in filled(text, "- ")), ""]


def figures(report: Report, pictures: Path) -> list[str]:
    """All that stands between the marks."""
    lines = [*about(report), *rates(report)]
    stages = {s["stage"] for s in report["summary"]}
    if "tokens" in stages:
        draw_curves(report, pictures / "comparison_curves.png")
        lines += [*pretrained(report), "![held-out loss by tokens and by seconds](pictures/comparison_curves.png)", ""]
    lines += tasks(report)
    if "length" in stages:
        draw_lengths(report, pictures / "comparison_lengths.png")
        lines += [*lengths(report), "![loss and speed by length](pictures/comparison_lengths.png)", ""]
    return [*lines, *caveats(report)]


def insert(page: str, lines: list[str]) -> str:
    """The page with these lines between its marks."""
    before, rest = page.split(BEGIN)
    return "\n".join([before + BEGIN, "", *lines, END + rest.split(END)[1]])


def main() -> None:
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS.parent / "results" / "comparison.json"
    if not source.exists():
        sys.exit(
            f"{source} is not there: hydra-ssm compare writes it as comparison.json into the folder of a comparison"
        )
    report = json.loads(source.read_text(encoding="utf-8"))
    PAGE.write_text(insert(PAGE.read_text(encoding="utf-8"), figures(report, DOCS / "pictures")), encoding="utf-8")


if __name__ == "__main__":
    main()
