"""``hubrl bench``: speed against what a user would run instead, both sides in one run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import click
import torch
from rich.console import Console
from rich.table import Table

from hubrl import cli

cli.refuse_foreign_modules("agents", "envs")

from hubrl.benches.machine import machine  # noqa: E402
from hubrl.benches.measuring import Result  # noqa: E402
from hubrl.benches.networks import measure_cache, measure_dispatch, measure_generator  # noqa: E402
from hubrl.benches.processes import measure_load, measure_memory  # noqa: E402
from hubrl.benches.training import (  # noqa: E402
    measure_dqn,
    measure_env,
    measure_hub_size,
    measure_ppo,
)
from hubrl.precision import check_device  # noqa: E402
from hubrl.train import limit_memory  # noqa: E402


class Bench(NamedTuple):
    """A measurement: which results it gives, and how; some take ``device``."""

    names: tuple[str, ...]
    measure: Callable[..., list[Result]]
    has_networks: bool = True


@click.command("bench")
@click.argument("name", default="all")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the results here.")
@click.option("--device", default="cpu", show_default=True, help="Of networks: cpu, cuda ...")
def command(name: str, file: Path | None, device: str) -> None:
    """
    Measure NAME: dispatch, generator, hub_size, ppo, dqn, env, cache, load, memory, or all.

    A part of one is named as in the table, such as ppo.trained.
    Ratios are ours / theirs of medians, measured in turns. Nothing else should run meanwhile.
    """
    with cli.user_errors():
        chosen = _choose(name)
        on = check_device("--device", device)
        cli.check_output("--json", file)
    device = str(on)
    if on.type == "cuda":
        torch.cuda.set_device(on)
    limit_memory()  # as in training
    facts = machine(device)
    results = []
    for bench in chosen:
        click.echo(f"measuring {', '.join(bench.names)} ...", err=True)
        measured = bench.measure(device=device) if bench.has_networks else bench.measure()
        results += [result for result in measured if _matches(result.name, name)]
        if file is not None:  # each time: one that fails takes no others with it
            rows = [result._asdict() | {"machine": facts} for result in results]
            file.write_text(json.dumps(rows, indent=1) + "\n")
    _print(results)


#: In the order of the table.
BENCHES = (
    Bench(
        ("dispatch.update", "dispatch.update32", "dispatch.rollout", "dispatch.rollout8"),
        measure_dispatch,
    ),
    Bench(("generator",), measure_generator),
    Bench(("hub_size", "hub_size.trained", "hub_size.optimizer"), measure_hub_size),
    Bench(("ppo.trained", "ppo.frozen", "ppo.none", "ppo.script"), measure_ppo),
    Bench(("dqn.trained", "dqn.frozen", "dqn.script"), measure_dqn),
    Bench(("env", "env.cpu"), measure_env, has_networks=False),
    Bench(("cache",), measure_cache),
    Bench(("load",), measure_load),
    Bench(("memory",), measure_memory),
)


def _choose(name: str) -> list[Bench]:
    chosen = [bench for bench in BENCHES if any(_matches(result, name) for result in bench.names)]
    if not chosen:
        names = [result for bench in BENCHES for result in bench.names]
        raise ValueError(f"bench {name!r} is unknown, allowed: all, {', '.join(names)}")
    return chosen


def _matches(result: str, name: str) -> bool:
    return name in ("all", result, result.split(".")[0])


def _print(results: list[Result]) -> None:
    table = Table("bench", "ratio", "goal", "ours", "theirs", "unit", "")
    for result in results:
        goal = "" if result.goal is None else f"{result.goal:.3g}"
        medians = [f"{value:.4g}" for value in (result.ours, result.theirs)]
        mark = {True: "met", False: "MISSED", None: ""}[result.is_met]
        table.add_row(result.name, f"{result.ratio:.3g}", goal, *medians, result.unit, mark)
    Console().print(table)


if __name__ == "__main__":
    cli.run(command, "python -m hubrl.bench")
