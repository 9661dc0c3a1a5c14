"""``python -m vision_tasks.complexity``: what a hub costs, against one model and all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from rich.console import Console
from rich.table import Table

from hubrl import cli
from hubrl.benches.machine import machine
from hubrl.precision import check_device
from hubrl.specs import HubSpec
from vision_tasks.costed import (
    DOUBLED,
    ENSEMBLE,
    GENERATOR,
    PATHWAY,
    SINGLE,
    Setup,
    check_setup,
    costed_hub,
)
from vision_tasks.counting import Cost, count_costs
from vision_tasks.memory import Memory, measure_memory
from vision_tasks.timing import Speed, measure_speed

MODES = ("inference", "training")


class Ratio(NamedTuple):
    """Two models compared, and what is wanted of it."""

    name: str
    ours: float
    theirs: float
    unit: str
    goal: str

    @property
    def ratio(self) -> float:
        """Ours over theirs."""
        return self.ours / self.theirs


@click.command("complexity")
@click.option("--hub", required=True, help="HUB, FOLDER or FILE.yaml; no weight files are needed.")
@click.option("--n-outputs", type=click.IntRange(min=1), default=100, show_default=True)
@click.option("--image-size", type=click.IntRange(min=1), default=224, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=12, show_default=True)
@click.option("--top-k", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--generator", default="resnet10", show_default=True, help="resnet10 or small.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--only", type=click.Choice(["counts"]), help="Nothing is measured.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Where figures go, too.")
def command(only: str | None, json_file: Path | None, **options: Any) -> None:
    """
    Parameters, FLOPs, speed and memory of one model, of all, and of the pathway.

    As tables 1 to 3 of the supplement of Hub-Pathway (arXiv 2206.03726). Weights are random.
    """
    setup = Setup(**options)
    with cli.user_errors():
        cli.check_output("--json", json_file)
        device = check_device("--device", setup.device)
        setup = setup._replace(device=str(device))
        hub = costed_hub(setup)
        check_setup(hub, setup)
        counts = count_costs(hub, setup)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    console = Console()
    console.print(_counts_table(setup, counts))
    figures: dict[str, Any] = {"setup": setup._asdict(), "machine": machine(setup.device)}
    figures["counts"] = {name: cost._asdict() for name, cost in counts.items()}
    failed = None
    if only is None:
        try:
            _measure(hub, setup, counts, console, figures)
        except RuntimeError as error:  # as for lack of memory; what was measured before is whole
            failed = error
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1))
    if failed is not None:
        raise click.ClickException(str(failed)) from failed


def _measure(
    hub: HubSpec,
    setup: Setup,
    counts: Mapping[str, Cost],
    console: Console,
    figures: dict[str, Any],
) -> None:
    """What is measured joins the figures one after the other: it takes minutes, and may fail."""
    speed = measure_speed(hub, setup)
    console.print(_single_image_table(speed))
    figures["speed"] = speed._asdict()
    memory, figures["memory"] = {}, {}
    for mode in MODES:
        memory[mode] = measure_memory(setup, mode)
        console.print(_memory_table(mode, memory[mode]))
        figures["memory"][mode] = {name: m._asdict() for name, m in memory[mode].items()}
    console.print(_costs_table(setup, counts, speed, memory))
    ratios = _ratios(setup, speed, memory)
    console.print(_ratio_table(ratios))
    figures["ratios"] = [ratio._asdict() | {"ratio": ratio.ratio} for ratio in ratios]


def _ratios(setup: Setup, speed: Speed, memory: Mapping[str, Mapping[str, Memory]]) -> list[Ratio]:
    ratios = []
    for mode, seconds in zip(MODES, (speed.inference, speed.training), strict=True):
        rate = {name: setup.batch_size / each for name, each in seconds.items()}
        goal = "at least 1.9, reach for 2.2" if mode == "inference" else "at least 1.9"
        for other, wanted in ((ENSEMBLE, goal), (SINGLE, "0.50 in the paper")):
            name = f"samples per second, {mode}: pathway / {other}"
            ratios.append(Ratio(name, rate[PATHWAY], rate[other], "1/s", wanted))
        name = f"seconds, {mode}: hub doubled / pathway"
        ratios.append(Ratio(name, seconds[DOUBLED], seconds[PATHWAY], "s", "at most 1.05"))
    for mode, by_model in memory.items():
        above = {name: each.above_weights for name, each in by_model.items()}
        for ours, other, wanted in (
            (PATHWAY, ENSEMBLE, "at most 0.6"),
            (DOUBLED, PATHWAY, "at most 1.05"),
        ):
            if by_model:
                name = f"memory above weights, {mode}: {ours} / {other}"
                ratios.append(Ratio(name, above[ours], above[other], "MB", wanted))
        if by_model:
            totals = by_model[PATHWAY].total, by_model[SINGLE].total
            name = f"memory, {mode}: pathway / {SINGLE}"
            ratios.append(Ratio(name, *totals, "MB", "1.86 in the paper"))
    return ratios


def _counts_table(setup: Setup, counts: Mapping[str, Cost]) -> Table:
    rows = [
        (name, f"{c.parameters / 1e6:.2f}", f"{c.flops / 1e9:.2f}") for name, c in counts.items()
    ]
    title = f"{setup.hub}, {setup.n_outputs} outputs, {setup.image_size} px"
    return _table(title, ("model", "parameters, M", "FLOPs of an image, G"), rows)


def _single_image_table(speed: Speed) -> Table:
    """The supplement's table 2."""
    ms = {name: 1000 * seconds for name, seconds in speed.single_image.items()}
    rows = [
        (name, f"{ms[GENERATOR]:.1f}", f"{ms[name] - ms[GENERATOR]:.1f}", f"{ms[name]:.1f}")
        if name == PATHWAY
        else (name, "", f"{ms[name]:.1f}", f"{ms[name]:.1f}")
        for name in (SINGLE, ENSEMBLE, PATHWAY)
    ]
    return _table("Inference of one image, ms", ("model", "generator", "models", "all"), rows)


def _costs_table(
    setup: Setup,
    counts: Mapping[str, Cost],
    speed: Speed,
    memory: Mapping[str, Mapping[str, Memory]],
) -> Table:
    """The supplement's table 1, with memory and speed of training and inference."""
    rows = []
    for name in (SINGLE, ENSEMBLE, PATHWAY):
        cells = [name, f"{counts[name].parameters / 1e6:.2f}", f"{counts[name].flops / 1e9:.2f}"]
        for mode, seconds in zip(MODES, (speed.inference, speed.training), strict=True):
            of_model = memory[mode].get(name)
            cells.append("" if of_model is None else f"{of_model.total:.0f}")
            cells.append(f"{setup.batch_size / seconds[name]:.4g}")
        rows.append(cells)
    measured = (f"{what}, {mode}" for mode in MODES for what in ("MB", "images/s"))
    columns = ("model", "parameters, M", "FLOPs, G", *measured)
    return _table(f"All costs, batch {setup.batch_size}", columns, rows)


def _memory_table(mode: str, by_model: Mapping[str, Memory]) -> Table:
    """The supplement's table 3."""
    rows = [
        (name, f"{m.loaded:.0f}", f"+{m.generator:.0f}", f"+{m.models:.0f}")
        for name, m in by_model.items()
    ]
    return _table(f"Memory, {mode}, MB", ("model", "loaded", "generator", "models"), rows)


def _ratio_table(ratios: Sequence[Ratio]) -> Table:
    rows = [
        (r.name, f"{r.ours:.4g}", f"{r.theirs:.4g}", r.unit, f"{r.ratio:.2f}", r.goal)
        for r in ratios
    ]
    columns = ("what is compared", "ours", "theirs", "unit", "ratio", "goal")
    return _table("Ratios, measured in turns", columns, rows)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    return table


if __name__ == "__main__":
    cli.run(command, "python -m vision_tasks.complexity")
