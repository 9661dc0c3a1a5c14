"""
The three games of this study and Breakout of breakout-shared: one table of the same 200,000 steps.

``python docs/studies/games-short/four_games.py`` prints a table of docs/studies/README.md.
"""

import csv
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hubrl.studies import statistics

HERE = Path(__file__).parent
VARIANTS = ("atari5", "best-single")


def curves() -> dict[tuple[str, str], np.ndarray]:
    """Learning curves (seeds, points) by game and variant."""
    points: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for study in ("breakout-shared", "games-short"):
        with (HERE.parent / study / "curves.csv").open() as file:
            for row in csv.DictReader(file):
                points[row["game"], row["variant"]][row["seed"]].append(float(row["return"]))
    return {key: np.array(list(seeds.values())) for key, seeds in points.items()}


def estimate(statistic: Callable[..., np.ndarray], *groups: list[np.ndarray]) -> str:
    """With its 95 % bootstrap interval."""
    found = statistics.estimate(statistic, *groups)
    return f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"


def main() -> None:
    """Areas, then final returns, in units of the control's mean on each game."""
    found = curves()
    games = sorted({game for game, _ in found})
    for name, score in (("area", lambda c: c.mean(axis=1)), ("final return", lambda c: c[:, -1])):
        unit = {game: score(found[game, "none"]).mean() for game in games}
        strata = {
            variant: [score(found[game, variant]) / unit[game] for game in games]
            for variant in ("none", *VARIANTS)
        }
        n_runs = {variant: sum(map(len, strata[variant])) for variant in strata}
        for variant, control in (
            ("atari5", "none"),
            ("best-single", "none"),
            ("atari5", "best-single"),
        ):
            pair = strata[variant], strata[control]
            print(
                f"{name}: {variant} / {control}, {n_runs[variant]} and {n_runs[control]} runs: "
                f"{estimate(statistics.interquartile_ratio, *pair)}, "
                f"P(improvement) {estimate(statistics.probability_of_improvement, *pair)}"
            )
            for game, *scores in zip(games, *pair, strict=True):
                ratio = estimate(statistics.mean_ratio, *([of_game] for of_game in scores))
                print(f"    {game}: {ratio}")


if __name__ == "__main__":
    main()
