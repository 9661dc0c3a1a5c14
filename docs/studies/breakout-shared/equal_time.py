"""
Areas at equal time: the curves of this study and the speeds of idle machines, put together.

``python docs/studies/breakout-shared/equal_time.py`` prints a table of docs/studies/README.md.
"""

import csv
from pathlib import Path

import numpy as np

N_STEPS = 200_000
#: Agent steps per second over those of plain SB3, whose curves are those of ``none``.
SPEEDS = {
    "AVX2": {"best-single": 1.22, "atari5": 0.72, "none": 1.34},
    "bfloat16": {"atari5": 0.95, "none": 1.81},
}


def mean_area(variant: str, n_steps: float) -> float:
    """Mean return of a variant's seeds in their first steps."""
    with Path(__file__).with_name("curves.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["variant"] == variant]
    steps = np.linspace(0, n_steps, 2001)[1:]
    areas = []
    for seed in sorted({row["seed"] for row in rows}):
        points = [(float(row["x"]), float(row["return"])) for row in rows if row["seed"] == seed]
        x, y = np.array([(0.0, 0.0), *points]).T
        areas.append(np.interp(steps, x, y).mean())
    return float(np.mean(areas))


for machine, speeds in SPEEDS.items():
    for base, base_speed in {"plain SB3": 1.0, "none": speeds["none"]}.items():
        for variant in [name for name in speeds if name != "none"]:
            seconds = N_STEPS / max(base_speed, speeds[variant])
            area = mean_area(variant, seconds * speeds[variant])
            base_area = mean_area("none", seconds * base_speed)
            print(f"{machine}: {variant} / {base}: {area / base_area:.2f}")
