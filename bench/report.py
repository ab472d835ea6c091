"""The benchmark's rows in the terminal, as CSV, as a plot, and as the table of the README.

`report.py --write` puts the table of bench/results/*.csv between the README's bench markers,
`report.py --check` exits with 1 if the README shows anything else,
`report.py --plot FILE [CSV ...]` draws the ratios and the shares of the machine's peak.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
MODES = {"fwd": "forward", "train": "training"}
Row = Mapping[str, object]


def number(row: Row, key: str) -> float:
    """A figure of a row, measured or read back from a CSV."""
    return float(str(row[key]))


def digits(value: float) -> str:
    """Three significant digits, never in exponents."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "0"


def verdict(row: Row) -> str:
    """Losing rows are called so; a spread that crosses 1 is no win."""
    low, mid = number(row, "ratio_p10"), number(row, "ratio_p50")
    return "SLOWER" if mid < 1 else "even" if low < 1 else "faster"


def heading(facts: Row) -> str:
    """The machine and the versions in one line."""
    dirty = {"1": " with uncommitted changes", "0": ""}.get(str(facts["dirty"]), "")
    threads = f"{facts['threads']} thread{'' if str(facts['threads']) == '1' else 's'}"
    return (
        f"{facts['cpu']} ({facts['isa']}), {threads}, "
        f"torch {facts['torch']}, fusedrnn {facts['fusedrnn']} at {facts['commit']}{dirty}, "
        f"backend {facts['backend']}, {facts['date']}"
    )


def header() -> str:
    return (
        f"{'shape':<33} {'mode':<5} {'torch.nn ms [p20-p80]':>21} {'fusedrnn ms [p20-p80]':>21} "
        f"{'ratio [p10-p90]':>18} {'GFLOP/s':>7} {'mm peak':>7} {'pairs':>5} "
        f"{'error, torch.nn':>15} verdict"
    )


def line(row: Row) -> str:
    """One row of the terminal's table; `!` marks that preempted pairs had to be kept."""

    def times(side: str) -> str:
        low, mid, high = (digits(number(row, f"{side}_p{p}_ms")) for p in (20, 50, 80))
        return f"{mid} [{low}-{high}]"

    low, mid, high = (number(row, f"ratio_p{p}") for p in (10, 50, 90))
    errors = ", ".join(f"{number(row, f'error_{side}'):.0e}" for side in ("ours", "torch"))
    pairs = f"{row['pairs']}{'' if str(row['undisturbed']) == '1' else '!'}"
    onnx = ""
    if row.get("onnx_p50_ms"):
        ratio = "{:.2f} [{:.2f}-{:.2f}]".format(
            *(number(row, f"onnx_ratio_p{p}") for p in (50, 10, 90))
        )
        onnx = f", ONNX Runtime {digits(number(row, 'onnx_p50_ms'))} ms, ratio {ratio}"
    return (
        f"{row['shape']!s:<33} {row['mode']!s:<5} {times('torch'):>21} {times('ours'):>21} "
        f"{f'{mid:.2f} [{low:.2f}-{high:.2f}]':>18} {number(row, 'gflops'):>7.1f} "
        f"{number(row, 'mm_share'):>7.0%} {pairs:>5} {errors:>15} {verdict(row)}{onnx}"
    )


def summary(rows: Sequence[Row], red: int) -> str:
    """Geometric means, the losses by name, the worst errors."""
    text = []
    for mode, word in MODES.items():
        ratios = [number(row, "ratio_p50") for row in rows if row["mode"] == mode]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            text.append(f"{word}: geometric mean {mean:.2f}x torch.nn over {len(ratios)} shapes")
    losses = [
        f"{row['shape']} {MODES[str(row['mode'])]}" for row in rows if verdict(row) == "SLOWER"
    ]
    text.append(f"slower than torch.nn: {', '.join(losses) or 'none'}")
    disturbed = sum(str(row["undisturbed"]) != "1" for row in rows)
    dropped = sum(int(number(row, "dropped")) for row in rows)
    kept = f"{disturbed} rows marked ! had too few others and keep them"
    text.append(f"preempted pairs: {dropped} dropped; {kept}")
    if rows:
        worst = max(rows, key=lambda row: number(row, "error_ours"))
        ours, theirs = number(worst, "error_ours"), number(worst, "error_torch")
        text.append(
            f"largest error against float64, relative to the tensor's largest value: "
            f"fusedrnn {ours:.1e}, torch.nn {theirs:.1e} ({worst['shape']})"
        )
    ratios = [number(row, "onnx_ratio_p50") for row in rows if row.get("onnx_p50_ms")]
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        text.append(f"forward: geometric mean {mean:.2f}x ONNX Runtime over {len(ratios)} shapes")
    if red:
        text.append(
            f"{red} shape{'s' if red > 1 else ''} failed the correctness gate and were not timed"
        )
    return "\n".join(text)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def plot(rows: Sequence[Row], path: Path) -> None:
    """Bars, one per shape and mode, in the order of the rows: the ratios with their spread, and
    the shares of the machine's peak."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    names = list(dict.fromkeys(str(row["shape"]) for row in rows))
    figure, (ratios, shares) = plt.subplots(
        1, 2, figsize=(11, 1.6 + 0.42 * len(names)), sharey=True, width_ratios=(7, 3),
        layout="constrained",
    )  # fmt: skip
    colours = {"fwd": "#4c9bd6", "train": "#1f4e79"}
    for offset, mode in zip((-0.2, 0.2), MODES, strict=True):
        some = [row for row in rows if row["mode"] == mode]
        mids = [number(row, "ratio_p50") for row in some]
        whiskers = [
            [mid - number(row, "ratio_p10") for row, mid in zip(some, mids, strict=True)],
            [number(row, "ratio_p90") - mid for row, mid in zip(some, mids, strict=True)],
        ]
        places = [names.index(str(row["shape"])) + offset for row in some]
        bars = ratios.barh(places, mids, 0.38, xerr=whiskers, color=colours[mode], ecolor="#777777")
        for bar, mid, row in zip(bars, mids, some, strict=True):
            if mid < 1:
                bar.set(facecolor="white", edgecolor=colours[mode], hatch="////")
            ratios.annotate(
                f"{mid:.2f}",
                (number(row, "ratio_p90"), bar.get_y() + 0.19),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        shares.barh(places, [number(row, "mm_share") for row in some], 0.38, color=colours[mode])
    line = ratios.axvline(1, color="#c0392b", linewidth=1.2, label="torch.nn")
    handles = [Patch(color=colours[mode], label=word) for mode, word in MODES.items()]
    handles.append(Patch(fill=False, hatch="////", label="slower than torch.nn"))
    ratios.set_yticks(range(len(names)), names, fontsize=9)
    ratios.invert_yaxis()
    ratios.set_xlim(0, 1.12 * max(number(row, "ratio_p90") for row in rows))
    ratios.set_xlabel("speed relative to torch.nn: median of paired ratios, whiskers p10 to p90")
    shares.xaxis.set_major_formatter("{x:.0%}")
    shares.set_xlabel("of the best float32 torch.mm")
    first = rows[0]
    figure.suptitle(
        f"fusedrnn {first['fusedrnn']} against torch {first['torch']}, {first['dtype']}, "
        f"{first['cpu']} ({first['isa']}), threads: {first['threads']}",
        fontsize=10,
    )
    for axes in (ratios, shares):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        handles=[line, *handles], fontsize=9, frameon=False, ncols=4, loc="outside lower center"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(path: Path) -> str:
    """One results file as the README shows it."""
    rows = read_csv(path)
    if not rows:
        raise ValueError(f"{path} has no rows")
    relative = path.relative_to(ROOT)
    busy = sum(row["undisturbed"] != "1" for row in rows)
    out = [
        f"{heading(rows[0])}. Medians; the ratio is the median of interleaved pairs with its "
        f"p10-p90 spread; the last column is the share of the best float32 `torch.mm` of the same "
        f"run ({number(rows[0], 'mm_gflops'):.0f} GFLOP/s). From [`{relative}`]({relative}), made "
        f"by `{rows[0]['command']}`. In {busy} of {len(rows)} rows other work preempted nearly "
        f"every pair, and those pairs are kept.",
        "",
        "| shape | T, B, I, H | | torch.nn ms | fusedrnn ms | ratio | of torch.mm |",
        "|---|---|---|---:|---:|---|---:|",
    ]
    for row in rows:
        low, mid, high = (number(row, f"ratio_p{p}") for p in (10, 50, 90))
        ratio = f"{mid:.2f} [{low:.2f}-{high:.2f}]"
        named = {"SLOWER": f"**{ratio} slower**", "even": f"{ratio} even", "faster": ratio}
        cells = [
            row["shape"],
            ", ".join(row[letter] for letter in "TBIH"),
            MODES[row["mode"]],
            digits(number(row, "torch_p50_ms")),
            digits(number(row, "ours_p50_ms")),
            named[verdict(row)],
            f"{number(row, 'mm_share'):.0%}",
        ]
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def updated(readme: str, results: Sequence[Path]) -> str:
    """The README's text with the tables of all results between its markers."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"README.md needs {BEGIN} and {END} once each")
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    tables = "\n\n".join(table(path) + "\n" for path in results)
    return f"{before}{BEGIN}\n{tables}{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", nargs="*", type=Path, help="results (default: bench/results/*.csv)")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true", help="rewrite the README's table")
    action.add_argument(
        "--check", action="store_true", help="fail if the README's table is not what --write gives"
    )
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="(%(default)s)")
    action.add_argument("--plot", type=Path, metavar="FILE", help="draw the results")
    options = parser.parse_args(arguments)
    results = [path.resolve() for path in options.csv] or sorted(RESULTS.glob("*.csv"))
    if options.plot:
        if not can_plot():
            print("report: --plot needs matplotlib (pip install matplotlib)", file=sys.stderr)
            return 2
        plot([row for path in results for row in read_csv(path)], options.plot)
        return 0
    old = options.readme.read_text()
    new = updated(old, results)
    if options.write:
        options.readme.write_text(new)
    elif old != new:
        print(
            f"report: {options.readme.name} does not show bench/results as they are; "
            f"`python bench/report.py --write` does",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
