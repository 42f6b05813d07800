"""Time the ops against torch's SDPA in the same run: ``python kernels/bench [--device cuda] [--write]``.

Every line is checked against fp64 first and gets no number if the check is red. The ideal speed-up of
sparse attention is 1 / density; ``share`` is how much of it was reached. For ops that do more than SDPA,
``cost`` is the time in units of SDPA.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from cases import Case, cases
from measure import dense_baseline, exact_rows, extra_megabytes, interleaved, machine, worst_error

RESULTS = Path(__file__).parent / "results"
LIMIT = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def measure(case: Case, device: str, repeats: int) -> dict[str, Any]:
    """Check and time one case."""
    line: dict[str, Any] = {"op": case.op, "label": case.label, "density": round(case.density, 4)}
    q, k, v = case.qkv
    if case.check is not None:
        error = case.check()
    else:
        assert case.allowed is not None
        error = worst_error(case.run(), *exact_rows(q, k, v, case.allowed))
    line["error"] = error
    if not error <= LIMIT[q.dtype]:
        return line | {"refused": f"error {error:.1e} is above {LIMIT[q.dtype]:.0e}"}
    baselines = dense_baseline(q, k, v)
    times = interleaved({**baselines, "ours": case.run, **case.parts}, repeats, device)
    fastest = min(baselines, key=lambda name: times[name])
    line |= {"baseline": fastest, "sdpa_ms": times[fastest], "ours_ms": times["ours"]}
    line |= {f"{name}_ms": times[name] for name in case.parts}
    line["extra_mb"] = extra_megabytes(case.run, device)
    if "eager" in case.parts:
        line["eager_extra_mb"] = extra_megabytes(case.parts["eager"], device)
    line["speedup"] = times[fastest] / times["ours"]
    if case.cost:
        line["cost"] = times["ours"] / times[fastest]
        line["met"] = None if case.target is None else line["cost"] <= case.target
    else:
        line["ideal"] = 1 / case.density
        line["share"] = line["speedup"] * case.density
        line["met"] = None if case.target is None else line["share"] >= case.target
    line["target"] = case.target
    return line


def show(line: dict[str, Any]) -> str:
    """One line of the table."""
    head = f"{line['op']:28} {line['label']:44} density {line['density']:.3f}  "
    if "refused" in line:
        return head + f"no number: {line['refused']}"
    text = f"SDPA {line['sdpa_ms']:8.1f} ms ({line['baseline']})  ours {line['ours_ms']:8.1f} ms  "
    if "cost" in line:
        text += f"cost {line['cost']:.2f}"
    else:
        text += f"{line['speedup']:.2f}x of ideal {line['ideal']:.2f}x, share {line['share']:.2f}"
    for name in ("lists", "choice", "eager"):
        if f"{name}_ms" in line:
            text += f"  {name} {line[f'{name}_ms']:.1f} ms"
    if line["extra_mb"] is not None:
        text += f"  +{line['extra_mb']:.0f} MB"
    if line.get("eager_extra_mb") is not None:
        text += f" (eager +{line['eager_extra_mb']:.0f} MB)"
    if line["met"] is not None:
        text += f"  target {line['target']} {'met' if line['met'] else 'MISSED'}"
    return head + text


def main() -> int:
    """Print the table; 1 if a check was red."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--op", action="append", default=[], help="only this op; may be repeated")
    parser.add_argument("--quick", action="store_true", help="only the smallest shape")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--write", action="store_true", help="keep the numbers as JSON under kernels/bench/results"
    )
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is at hand")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    about = machine(arguments.device)
    sys.stdout.write(json.dumps(about) + "\n")
    lines = []
    for case in cases(arguments.device, set(arguments.op), arguments.quick):
        line = measure(case, arguments.device, arguments.repeats)
        lines.append(line)
        sys.stdout.write(show(line) + "\n")
        sys.stdout.flush()
    if arguments.write:
        name = "cpu" if arguments.device == "cpu" else about["device"].replace(" ", "_").lower()
        path = RESULTS / f"{name}.json"
        rounded = [
            {
                k: round(x, 4) if isinstance(x, float) and k != "error" else x
                for k, x in line.items()
            }
            for line in lines
        ]
        path.write_text(json.dumps({"machine": about, "lines": rounded}, indent=1) + "\n", "utf-8")
        sys.stdout.write(f"wrote {path.name}\n")
    return int(any("refused" in line for line in lines))


if __name__ == "__main__":
    raise SystemExit(main())
