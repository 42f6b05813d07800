"""Compile every Triton kernel for sm_90, no GPU needed, and look at what the compiler made of it.

    python kernels/bench/aot.py              print the table, compare it with results/aot_sm90.json
    python kernels/bench/aot.py --write      write that file (only the rows of --op, if given)

Nothing here is a speed. A spill, a product that missed the tensor cores or a kernel that does not fit
a multiprocessor would be slow on any GPU, and they are seen here. Numbers depend on the Triton
version, so the table carries it; under another version only the limits are checked.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

# Triton reads it when a kernel is decorated, and an interpreted kernel cannot be compiled.
os.environ.pop("TRITON_INTERPRET", None)

import mmattn_kernels
import triton
from mmattn_kernels._aot import AotCase
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TABLE = Path(__file__).parent / "results" / "aot_sm90.json"
TARGET = GPUTarget("cuda", 90, 32)
SHARED_LIMIT = 227 * 1024


@dataclass(frozen=True)
class Row:
    """What one compiled kernel is made of; counts are of instructions in the whole kernel."""

    warps: int
    stages: int
    registers: int
    spills: int
    shared: int
    wgmma: int
    mma: int
    tma: int
    instructions: int


class _Hopper:
    """Stands for an H100 towards Triton's run time, which asks for no more than this to compile."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled:
    """While entered, launching a kernel compiles it instead; what was compiled is kept in `kernels`."""

    def __init__(self) -> None:
        self.kernels: list[tuple[JITFunction[Any], Any]] = []

    def __enter__(self) -> Compiled:
        self._run = run = JITFunction.run
        kernels = self.kernels

        def compile_only(
            fn: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any
        ) -> Any:
            made = run(fn, *args, grid=grid, warmup=True, **kwargs)
            if all(made is not other for _, other in kernels):
                kernels.append((fn, made))
            return made

        driver.set_active(_Hopper())  # type: ignore[arg-type]
        JITFunction.run = compile_only  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        JITFunction.run = self._run  # type: ignore[method-assign]


def read(kernel: Any) -> Row:
    """Registers and instructions out of a compiled kernel's binary."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        usage = _output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path))
        sass = _output(knobs.nvidia.nvdisasm.path, "-c", str(path))
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", sass)
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None or not opcodes:
        raise RuntimeError("cuobjdump and nvdisasm print another form than this file reads")

    def count(*names: str) -> int:
        return sum(opcode in names for opcode in opcodes)

    return Row(
        warps=kernel.metadata.num_warps,
        stages=kernel.metadata.num_stages,
        registers=int(registers[1]),
        spills=count("STL", "LDL"),
        shared=kernel.metadata.shared,
        wgmma=count("HGMMA"),
        mma=count("HMMA"),
        tma=count("UTMALDG"),
        instructions=len(opcodes),
    )


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def modules() -> Iterator[tuple[str, ModuleType]]:
    """Every op that has a Triton module, with that module."""
    for package in pkgutil.iter_modules(mmattn_kernels.__path__):
        name = f"mmattn_kernels.{package.name}"
        if package.ispkg and find_spec(f"{name}.triton") is not None:
            yield package.name, importlib.import_module(f"{name}.triton")


def cases(module: ModuleType) -> list[AotCase]:
    """The cases an op offers; none if it has no `aot_cases`."""
    found: list[AotCase] = module.aot_cases() if hasattr(module, "aot_cases") else []
    names = [case.name for case in found]
    assert len(names) == len(set(names)), f"{module.__name__}: two cases of one name"
    return found


def multiplies(kernel: Any) -> bool:
    """Whether a kernel multiplies 16-bit matrices, which must be a tensor core's work."""
    dots = (line for line in kernel.asm["ttir"].splitlines() if "tt.dot " in line)
    return any(re.search(r"xb?f16[,>]", line) for line in dots)


def faults(key: str, case: AotCase, kernel: Any, row: Row) -> Iterator[str]:
    """Hard limits that a kernel misses, as sentences."""
    if row.spills:
        yield f"{key}: {row.spills} loads and stores of spilled registers."
    if row.shared > SHARED_LIMIT:
        yield f"{key}: {row.shared} bytes of shared memory; {SHARED_LIMIT} is the most."
    if multiplies(kernel) and not (row.wgmma or (row.mma and case.tensor_cores == "mma")):
        yield f"{key}: 16-bit products compile to {row.mma} mma and no wgmma instructions."


def drift(key: str, row: Row, table: dict[str, Any]) -> Iterator[str]:
    """Where a kernel is worse than the table of the same Triton version says."""
    if key not in table:
        yield f"{key}: not in the table; add it with --write."
        return
    old = Row(**table[key])
    for name in ("registers", "shared", "instructions"):
        now, then = getattr(row, name), getattr(old, name)
        if now > 1.05 * then + 8:
            yield f"{key}: {name} {then} -> {now}."
    for name in ("wgmma", "tma"):
        if getattr(row, name) < getattr(old, name):
            yield f"{key}: {name} {getattr(old, name)} -> {getattr(row, name)}."


def needed(fn: JITFunction[Any]) -> Iterator[JITFunction[Any]]:
    """A kernel and the jitted functions that it calls."""
    yield fn
    for name in fn.fn.__code__.co_names:
        callee = fn.fn.__globals__.get(name)
        if isinstance(callee, JITFunction):
            yield from needed(callee)


def unseen(op: str, seen: set[JITFunction[Any]]) -> Iterator[str]:
    """Kernels of an op that no case launches."""
    reached = {id(inner) for fn in seen for inner in needed(fn)}
    for name, module in list(sys.modules.items()):
        if not name.startswith(f"mmattn_kernels.{op}."):
            continue
        for fn in vars(module).values():
            if isinstance(fn, JITFunction) and fn.fn.__module__ == name and id(fn) not in reached:
                yield f"{op}: no case launches the kernel {fn.fn.__name__}."


@dataclass
class Report:
    """What a run found: rows by key, and sentences about what is wrong."""

    rows: dict[str, Row]
    problems: list[str]
    table: dict[str, Any]

    def add(self, op: str, case: AotCase, kernels: list[tuple[JITFunction[Any], Any]]) -> None:
        """Measure the kernels that `case` launched."""
        if not kernels:
            self.problems.append(f"{op}/{case.name}: launches no kernel.")
        for fn, kernel in kernels:
            stem = f"{op}/{case.name}/{fn.fn.__name__.strip('_')}"
            again = sum(key.split("#")[0] == stem for key in self.rows)
            key = f"{stem}#{again + 1}" if again else stem
            row = self.rows[key] = read(kernel)
            self.problems += faults(key, case, kernel, row)
            if self.table["triton"] == triton.__version__:
                self.problems += drift(key, row, self.table["kernels"])


def run(only: str | None, quick: bool, table: dict[str, Any]) -> Report:
    """Compile the cases of all ops, or of one; with `quick` those of the default test suite."""
    report = Report({}, [], table)
    for op, module in modules():
        if only not in (None, op):
            continue
        seen: set[JITFunction[Any]] = set()
        offered = cases(module)
        if not offered:
            report.problems.append(f"{op}: its Triton module has no aot_cases().")
        for case in offered:
            if quick and not case.quick:
                continue
            with Compiled() as compiled:
                case.launch()
            report.add(op, case, compiled.kernels)
            seen.update(fn for fn, _ in compiled.kernels)
        if offered and not quick:
            report.problems += unseen(op, seen)
    return report


def load() -> dict[str, Any]:
    """The committed table; an empty one of this Triton version if there is none."""
    if not TABLE.exists():
        return {"target": "sm_90", "triton": triton.__version__, "kernels": {}}
    table: dict[str, Any] = json.loads(TABLE.read_text())
    return table


def save(report: Report, only: str | None) -> None:
    """Write the table; with `only`, the rows of other ops stay."""
    old = load()
    if only and old["triton"] != triton.__version__:
        raise SystemExit(f"The table is of Triton {old['triton']}; write all ops, not only {only}.")
    kept = {k: v for k, v in old["kernels"].items() if only and not k.startswith(f"{only}/")}
    rows = kept | {key: asdict(row) for key, row in report.rows.items()}
    table = {"target": "sm_90", "triton": triton.__version__, "kernels": dict(sorted(rows.items()))}
    lines = json.dumps(table, indent=1).replace("\n   ", " ").replace("\n  }", " }")
    TABLE.write_text(lines + "\n")


def main() -> int:
    """Print the table and what is wrong; the exit status is 1 if anything is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", help="the package of one op, such as linear")
    parser.add_argument("--quick", action="store_true", help="the cases of the test suite only")
    parser.add_argument("--write", action="store_true", help="write the table")
    parser.add_argument("--json", action="store_true", help="print rows and problems as JSON")
    asked = parser.parse_args()
    report = run(asked.op, asked.quick, load() if not asked.write else {"triton": None})
    if asked.write:
        save(report, asked.op)
    if asked.json:
        rows = {key: asdict(row) for key, row in report.rows.items()}
        sys.stdout.write(json.dumps({"kernels": rows, "problems": report.problems}))
        return int(bool(report.problems))
    names = [*Row.__annotations__]
    width = max((len(key) for key in report.rows), default=6)
    lines = [f"Triton {triton.__version__}, sm_90, compiled ahead of time"]
    lines.append(f"{'kernel':{width}} " + " ".join(f"{name:>12}" for name in names))
    for key, row in report.rows.items():
        lines.append(f"{key:{width}} " + " ".join(f"{v:>12}" for v in asdict(row).values()))
    sys.stdout.write("\n".join([*lines, *report.problems]) + "\n")
    return int(bool(report.problems))


if __name__ == "__main__":
    raise SystemExit(main())
