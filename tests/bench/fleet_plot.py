"""What the simulation of fleets found, as one picture. Needs matplotlib, which the extra `bench` has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.bench.fleet_model import CEILING, plan
from tests.bench.fleet_rates import SHORT, texts_per_s
from tests.bench.fleet_tables import MIDDLE, Found

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"float32": "#1f4e79", "float16": "#2a9d8f", "int8": "#e9a23b"}
FLEET, FLEET_TICKS = (*range(1, 16), *range(16, 257, 8)), (1, 4, 16, 64, 256)
#: Thousand texts a second.
RATE_TICKS = (10, 20, 50, 100, 200)
DRAWN = ((1, "float32"), (64, "float32"), (64, "float16"), (64, "int8"))


class NoMatplotlibError(ImportError):
    """The picture cannot be drawn; the tables can."""

    def __init__(self) -> None:
        super().__init__("matplotlib is not installed; the picture needs it: pip install 'embedq[bench]'")


def draw(found: Found, path: Path) -> None:
    """Raises NoMatplotlibError."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as err:
        raise NoMatplotlibError from err
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "embedq", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
    ):
        figure = Figure(figsize=(11, 7.6), layout="constrained")
        axes: Any = figure.subplots(2, 2)
        _capacity(axes[0][0], found)
        _waits(axes[0][1], found)
        _servers(axes[1][0], found)
        _wakes(axes[1][1], found)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _capacity(axes: Axes, found: Found) -> None:
    for precision, colour in COLOURS.items():
        costs = [cost for cost in found.costs if cost.precision == precision and cost.texts != 60]
        texts, rates = [cost.texts for cost in costs], [cost.texts_per_s / 1e3 for cost in costs]
        axes.plot(texts, rates, "o-", color=colour, label=precision)
    device = texts_per_s(MIDDLE, SHORT) / 1e3
    axes.axhline(device, color="#888888", linestyle="--", linewidth=1)
    axes.annotate(f"one H100, {SHORT.name} of {SHORT.tokens} tokens", (1, 1.05 * device), color="#555555")
    title = "What fills one Redis server"
    axes.set(xscale="log", yscale="log", xlabel="texts a job", ylabel="thousand texts/s", title=title)
    ticks = sorted({cost.texts for cost in found.costs} - {60})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_yticks(RATE_TICKS, [str(tick) for tick in RATE_TICKS])
    axes.legend(loc="lower right")


def _waits(axes: Axes, found: Found) -> None:
    waits = sorted(found.waits, key=lambda one: one.measured.cpu_share)
    busy = [one.measured.cpu_share for one in waits]
    numbers = ", ".join(sorted({str(one.measured.num_workers) for one in waits}))
    axes.plot(busy, [one.predicted_s * 1e3 for one in waits], "--", color="#888888", label="model")
    measured = [one.measured_s * 1e3 for one in waits]
    axes.plot(busy, measured, "o", color=COLOURS["float32"], label=f"measured, {numbers} workers")
    title = "Claims and publications, 8 texts a job, float16"
    axes.set(xlabel="share of the server's thread that is busy", ylabel="mean call, ms", title=title, yscale="log")
    axes.legend(loc="upper left")


def _servers(axes: Axes, found: Found) -> None:
    for cost in found.durable:
        if (cost.texts, cost.precision) in DRAWN:
            plans = [plan(1e9, texts_per_s(MIDDLE, SHORT), number, cost) for number in FLEET]
            label = f"{cost.texts} text{'s' * (cost.texts > 1)} a job, {cost.precision}"
            style = ":" if cost.texts == 1 else "-"
            axes.plot(FLEET, [one.num_servers for one in plans], style, color=COLOURS[cost.precision], label=label)
    title = f"Servers for a fleet, {CEILING:.0%} busy, sentences"
    axes.set(xscale="log", yscale="log", xlabel="H100s", ylabel="Redis servers", title=title)
    axes.set_xticks(FLEET_TICKS, [str(tick) for tick in FLEET_TICKS])
    axes.legend()


def _wakes(axes: Axes, found: Found) -> None:
    numbers = sorted({one.num_workers for one in found.wakes})
    for number in numbers:
        some = [one.cpu_s * 1e3 for one in found.wakes if one.num_workers == number]
        axes.plot([number] * len(some), some, "o", color=COLOURS["float32"])
    title = "One job comes to an idle fleet"
    axes.set(xscale="log", xlabel="workers that wait", ylabel="server's CPU, ms", title=title)
    axes.set_xticks(numbers, [str(number) for number in numbers])
