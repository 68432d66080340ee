"""What a benchmark finds, as lines and tables for a person and as JSON."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from harness import machine


class Spread(NamedTuple):
    """Median and quartiles of what was measured."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(*np.quantile(values, (0.5, 0.25, 0.75)).tolist())

    def __str__(self) -> str:
        return f"{short(self.median)} ({short(self.low)}-{short(self.high)})"


class Report:
    """Prints what a benchmark finds at once; `write` writes all of it as JSON if there is a file for it.

    Args:
        setting: what is measured, and how.
    """

    def __init__(self, output: Path | None, device: torch.device, **setting: object):
        self.output, self.found = output, {"machine": machine(device), "setting": setting}
        print(self.found["machine"])
        print("; ".join(f"{name} {value}" for name, value in setting.items()), flush=True)

    def line(self, name: str, text: str) -> None:
        self.found[name] = text
        print(f"\n{name}: {text}", flush=True)

    def table(self, name: str, rows: list[dict]) -> None:
        """Prints rows, which have the same keys; None is a missing value."""
        self.found[name] = [{key: rounded(value) for key, value in row.items()} for row in rows]
        print(f"\n{name}\n\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
        for row in rows:
            print(f"| {' | '.join(map(cell, row.values()))} |", flush=True)

    def write(self) -> None:
        if self.output is not None:
            self.output.write_text(json.dumps(self.found, indent=1) + "\n")


def short(number: float) -> str:
    """A number of three digits, without an exponent."""
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:.3g}"


def cell(value: object) -> str:
    """A value of a table in words."""
    if value is None:
        return "-"
    return short(value) if isinstance(value, float) else str(value)


def rounded(value: object) -> object:
    """A value of a table for JSON, with numbers of four digits."""
    if isinstance(value, Spread):
        return {name: rounded(number) for name, number in value._asdict().items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
