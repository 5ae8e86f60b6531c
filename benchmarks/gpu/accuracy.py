"""How exact the kernels are: outputs and every gradient, against float64 and beside the eager form in the same dtype.

    python benchmarks/gpu/accuracy.py --random 300 --json benchmarks/gpu/results/accuracy.json

A row holds for one dtype: the relative error (Frobenius norm; absolute where the truth is zero) may be at most twice
the eager form's and half an eps; at most 1e-2 in bf16, and 1e-4 for gradients of A_log and dt_bias in float32, unless
the eager form is beyond that as well, which is said. Two runs must agree to the bit. What is over twice by chance, as
sums over a few numbers are, is drawn anew and judged by the root mean square of REPEATS draws.

On the CPU, through Triton's interpreter (no bfloat16 there):

    TRITON_INTERPRET=1 python benchmarks/gpu/accuracy.py --device cpu --dtypes float32 --only "L = 1" --random 2
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path

import torch
from cases import DTYPES, NAMED, Case, drawn, problem
from large import spot_checks
from torch import Tensor

from hydra_ssm.bench.machine import facts

REPEATS = 8
CAPS = {"bfloat16": 1e-2, "float32": 1e-4}
CAPPED_IN_FLOAT32 = {"A_log", "dt_bias"}


def error(found: Tensor, exact: Tensor) -> float:
    """Relative, or absolute where `exact` is zero or too small for float32; NaN where anything found is."""
    size = float(exact.norm())
    return float((found.double() - exact).norm()) / (size if size > torch.finfo(torch.float32).tiny else 1.0)


def errors(case: Case, device: str) -> tuple[dict[str, tuple[float, float]], bool]:
    """(ours, eager) for the output and every gradient, and whether two runs of ours agree."""
    run = problem(case, device)
    exact = run("chunked", torch.float64)
    dtype = getattr(torch, case.dtype)
    usual = run("chunked", dtype)
    if device != "cpu":
        poison = [torch.full((1 << 24,), float("nan"), device=device) for _ in range(4)]
        del poison  # what the allocator hands out next holds NaN
    ours = run("triton", dtype)
    again = run("triton", dtype)
    pairs = {name: (error(ours[name], truth), error(usual[name], truth)) for name, truth in exact.items()}
    return pairs, all(torch.equal(ours[name].nan_to_num(), again[name].nan_to_num()) for name in ours)


def judged(case: Case, device: str) -> dict:
    """The row of a case."""
    row: dict = {"case": asdict(case), "ok": False}
    try:
        row["errors"], row["same"] = errors(case, device)
        half_eps = torch.finfo(getattr(torch, case.dtype)).eps / 2
        over = [name for name, (ours, usual) in row["errors"].items() if not ours <= 2 * usual + half_eps]
        if over:
            row["first"], row["errors"] = row["errors"], means(case, device)
            over = [name for name in over if not row["errors"][name][0] <= 2 * row["errors"][name][1] + half_eps]
        row["over"] = over
        beyond = {name: pair for name, pair in row["errors"].items() if not pair[0] <= cap(case, name)}
        row["beyond"] = [name for name, (_, usual) in beyond.items() if usual <= cap(case, name)]
        row["both beyond"] = [name for name in beyond if name not in row["beyond"]]
        row["ok"] = row["same"] and not over and not row["beyond"]
    except Exception as problem:
        row["failed"] = f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
    return row


def means(case: Case, device: str) -> dict[str, tuple[float, float]]:
    """Root mean squares of the errors of several draws."""
    draws = [errors(replace(case, seed=case.seed + 1 + k), device)[0] for k in range(REPEATS)]
    return {name: tuple((sum(d[name][k] ** 2 for d in draws) / REPEATS) ** 0.5 for k in (0, 1)) for name in draws[0]}  # type: ignore[return-value]


def cap(case: Case, name: str) -> float:
    """The most that an error may be whatever the eager form's is."""
    free = case.dtype == "float32" and name not in CAPPED_IN_FLOAT32
    return float("inf") if free else CAPS.get(case.dtype, float("inf"))


def line(row: dict) -> str:
    """A row of the table: worst error of ours, and of the eager form for the same."""
    case = Case(**row["case"])
    usual = asdict(Case(name=case.name, dtype=case.dtype))
    differs = " ".join(f"{k}={v}" for k, v in asdict(case).items() if case.name == "drawn" and v != usual[k])
    begin = f"{'ok ' if row['ok'] else 'BAD'} {case.dtype:9}{case.name:31}"
    if "failed" in row:
        return f"{begin}{row['failed']}  {differs}"
    found = row["errors"]
    y, worst = found["y"], max(found, key=lambda name: (found[name][0] != found[name][0], found[name][0]))
    notes = [f"{what} {name} {found[name][0]:.1e}/{found[name][1]:.1e}"
             for what in ("over", "beyond", "both beyond") for name in row[what]]  # fmt: skip
    notes += [] if row["same"] else ["NOT THE SAME TWICE"]
    pairs = "".join(f"{a:9.1e}{b:9.1e}" for a, b in (y, found[worst]))
    return f"{begin}{pairs}  {worst:12} {'; '.join(notes)}  {differs}".rstrip()


def shares(cases: list[Case], jobs: int) -> list[list[Case]]:
    """The cases by the kernels that they take, so that each is compiled in one process."""
    alike: dict[tuple, list[Case]] = defaultdict(list)
    for case in cases:
        alike[case.kernels].append(case)
    found: list[list[Case]] = [[] for _ in range(jobs)]
    for some in sorted(alike.values(), key=len, reverse=True):
        min(found, key=lambda share: 20 * len({case.kernels for case in share}) + len(share)).extend(some)
    return [share for share in found if share]


def measured(cases: list[Case], device: str, jobs: int, limit: float) -> list[dict]:
    """All rows, in the order of the cases; in several processes where asked for, which have `limit` seconds."""
    end = time.time() + limit
    if jobs == 1:
        return [judged(case, device) for case in cases]
    with tempfile.TemporaryDirectory() as folder:
        workers = []
        for k, share in enumerate(shares(cases, jobs)):
            file = Path(folder, f"{k}.json")
            file.write_text(json.dumps([asdict(case) for case in share]), encoding="utf-8")
            file.with_suffix(".rows").touch()
            workers.append((subprocess.Popen([sys.executable, __file__, "--device", device, "--share", file]), file))
        found = {}
        for process, file in workers:
            try:
                process.wait(max(0.1, end - time.time()))
            except subprocess.TimeoutExpired:
                process.kill()
            for row in map(json.loads, file.with_suffix(".rows").read_text(encoding="utf-8").splitlines()):
                found[Case(**row["case"])] = row
    lost = {"ok": False, "failed": "its process died or came too late"}
    return [found.get(case, {"case": asdict(case), **lost}) for case in cases]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--only", help="named cases whose name holds this")
    parser.add_argument("--random", type=int, default=0, help="drawn configurations")
    parser.add_argument("--large", action="store_true", help="more than 2^31 numbers: takes 70 GB")
    parser.add_argument("--jobs", type=int, default=1, help="processes; what takes long is compilation")
    parser.add_argument(
        "--limit", type=float, default=3600, help="seconds of such processes; rows that come later fail"
    )
    parser.add_argument("--json", type=Path, help="write all errors there")
    parser.add_argument("--share", type=Path, help=argparse.SUPPRESS)  # a process of `measured`
    return parser.parse_args()


def main() -> int:
    given = options()
    torch.backends.cudnn.allow_tf32 = False
    if given.share:
        cases = [Case(**case) for case in json.loads(given.share.read_text(encoding="utf-8"))]
        with given.share.with_suffix(".rows").open("w", encoding="utf-8", buffering=1) as rows:
            for case in cases:
                rows.write(json.dumps(judged(case, given.device)) + "\n")
        return 0
    begin = time.time()
    cases = [case for case in NAMED if case.dtype in given.dtypes and (given.only or "") in case.name]
    cases += drawn(given.random, tuple(given.dtypes)) if given.random else []
    rows = measured(cases, given.device, given.jobs, given.limit)
    print(f"{'':44}{'output: ours, eager':>18}{'worst: ours, eager':>18}")
    for row in rows:
        if row["case"]["name"] != "drawn" or not row["ok"]:
            print(line(row))
    large = spot_checks(given.device) if given.large else []
    for row in large:
        print("ok " if row["ok"] else "BAD", row["name"], row.get("errors", ""), row.get("failed", ""))
    bad = sum(not row["ok"] for row in rows + large)
    both = sum(bool(row.get("both beyond")) for row in rows)
    again = sum("first" in row for row in rows)
    seconds = time.time() - begin
    print(f"{len(rows) + len(large)} rows, {sum(r['case']['name'] == 'drawn' for r in rows)} of them drawn; {bad} bad, "
          f"{again} judged over several draws, {both} beyond a cap with the eager form; {seconds:.0f} s")  # fmt: skip
    if given.json:
        report = {"command": shlex.join(["python", *sys.argv]), "date": date.today().isoformat(), "seconds": seconds,
                  "machine": facts(torch.device(given.device)), "rows": rows, "large": large}  # fmt: skip
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(report) + "\n", encoding="utf-8")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
