"""What bench.py does with numbers: variants in turn, seconds, tables, bench_NAME.json."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[1]  # the repository's root
SPEED = "images per second"  # the column that ratios are taken of
Numbers = dict[str, dict[str, list[float]]]  # {variant: {column: a value for each round}}


def in_turn(
    command: str, variants: tuple[str, ...], options: argparse.Namespace, **changes: Any
) -> Numbers:
    """Run the variants in processes, A B C A B C."""
    numbers: Numbers = {name: {} for name in variants}
    for round_number in range(options.rounds):
        for name in variants:
            given = {"variant": name, "seed": options.seed + round_number}
            given = vars(options) | changes | given
            del given["command"]
            flags = [f"--{key}={value}" for key, value in given.items()]
            call = [sys.executable, HERE / "tools" / "bench.py", command, *flags]
            done = subprocess.run(call, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(f"{name} failed: see above")
            measured = json.loads(done.stdout.splitlines()[-1])
            print(f"{command} {name} {changes}: {measured}", file=sys.stderr, flush=True)
            for key, value in measured.items():
                numbers[name].setdefault(key, []).append(value)
    return numbers


def print_table(title: str, numbers: Numbers, reference: str | None) -> None:
    """Print medians with their ranges, and the ratio to the reference's images per second."""
    columns = list(dict.fromkeys(key for values in numbers.values() for key in values))
    print(f"\n{title}\n\n| | {' | '.join(columns)} |{' ratio |' if reference else ''}")
    print(f"| --- |{' --- |' * (len(columns) + bool(reference))}")
    for name, values in numbers.items():
        cells = []
        for column in columns:
            measured = values.get(column, [])
            several = len(measured) > 1
            spread = f" ({min(measured):.3g} to {max(measured):.3g})" if several else ""
            cells.append(f"{statistics.median(measured):.4g}{spread}" if measured else "")
        if reference:
            ratio = statistics.median(values[SPEED]) / statistics.median(numbers[reference][SPEED])
            cells.append(f"{ratio:.2f}")
        print(f"| {name} | {' | '.join(cells)} |")


def machine() -> str:
    """The machine in words."""
    import torch

    from kit.network import model

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    bf16 = f"bf16 {'native' if model.cpu_has_bf16() else 'not native'}"
    cores = f"{platform.machine()}, {os.cpu_count()} cores"
    return f"{cores}, {bf16}, {gpu}, torch {torch.__version__}"


def load_report(name: str) -> dict[str, Any]:
    """What an earlier run wrote to bench_NAME.json."""
    path = HERE / f"bench_{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write_report(name: str, **measured: Any) -> None:
    """Write what was measured to bench_NAME.json, with the machine and the call."""
    report = {"machine": machine(), "call": this_call(), **measured}
    (HERE / f"bench_{name}.json").write_text(json.dumps(report, indent=2) + "\n")


def this_call() -> str:
    """The command and its flags."""
    return " ".join(sys.argv[1:])


def seconds_of(work: Callable, device: str) -> float:
    """How long a piece of work takes, on the device too."""
    import torch

    started = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started
