"""The lines that ``bench_svf.py`` prints."""

from __future__ import annotations

from typing import Any

WRONG = ("refused", "failed")  # columns of a row without a time

HEADER = (
    f"{'':2}{'contestant':20}{'slots':>6}{'time_us':>12}{'p20–p80':>20}{'GB/s':>8}{'% floor':>9}"
    f"{'/three-op':>11}{'/dense':>8}{'error':>10}"
)


def line(row: dict[str, Any]) -> str:
    """Of a contestant of a line-up."""
    for word in WRONG:
        if word in row:
            return f"  {row['name']:20}{row['slots']:>6}  {word.upper()}: {row[word]}"

    def number(key: str, width: int) -> str:
        return f"{row[key]:>{width}.2f}" if row.get(key) is not None else " " * width

    spread = f"{row['p20_us']:.1f}–{row['p80_us']:.1f}"
    note = "" if row["timing"] in ("wall", "graph") else f"  ({row['timing']})"
    return (
        f"  {row['name']:20}{row['slots']:>6}{row['time_us']:>12.1f}{spread:>20}{row['gbs']:>8.1f}"
        f"{row['percent_of_floor']:>9.1f}{number('ratio_three_op', 11)}{number('ratio_dense', 8)}"
        f"{row['error']:>10.1e}{note}"
    )


def training_line(row: dict[str, Any]) -> str:
    """Of a form of the training step."""
    head = f"  {row['dtype']:5}{row['shape']:>12} T={row['tokens']:<6}{row['name']:20}"
    for word in WRONG:
        if word in row:
            return f"{head}  {word.upper()}: {row[word]}"
    ratios = [f"{row[k]:.2f}" if k in row else "–" for k in ("ratio_three_op", "ratio_rebuilt")]
    return (
        f"{head}{row['time_us']:>12.1f} us  peak {row['peak_mem_mib']:>7.1f} MiB  largest "
        f"{row['largest_mem_mib']:>6.1f} MiB  kept {row['kept_mib']:>6.1f} MiB  "
        f"/three-op {ratios[0]}  /rebuilt {ratios[1]}"
    )
