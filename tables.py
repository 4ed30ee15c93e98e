"""Figures of evaluations: rates with their intervals, and tables in markdown."""

import numpy as np

from data.scoring import wilson
from embodiment import CONTROL_HZ


def summary(episodes, hz=CONTROL_HZ):
    """Success rate with 95% interval, mean seconds to success and jerk (rad/s^3) over episodes."""
    steps = [e["steps"] for e in episodes if e["success"]]
    n = len(episodes)
    return {
        "success": len(steps) / n,
        "episodes": n,
        "interval": wilson(len(steps), n),
        "seconds_to_success": np.mean(steps) / hz if steps else None,
        "jerk": np.mean([e["jerk"] for e in episodes]),
    }


def failures(episodes):
    """{name: reason} of the failed episodes."""
    return {e["name"]: e["reason"] for e in episodes if not e["success"]}


def rate(values):
    """{"rate", "n", "interval"} of some booleans."""
    values = list(values)
    return {
        "rate": float(np.mean(values)) if values else None,
        "n": len(values),
        "interval": wilson(sum(values), len(values)),
    }


def mean_of_tiers(tiers):
    """{"mean", "interval"} of the tiers' rates, each of which has an interval of its own.

    The interval is MOVER's (Zou and Donner 2008): distances from each rate to its interval's ends,
    squared and added.
    """
    rates = np.array([tier["rate"] for tier in tiers.values()])
    ends = np.array([tier["interval"] for tier in tiers.values()])  # (tiers, 2)
    away = np.sqrt(((ends - rates[:, None]) ** 2).sum(axis=0)) / len(rates)
    mean = rates.mean()
    return {"mean": mean, "interval": (mean - away[0], mean + away[1])}


def percent(figure):
    return "" if figure["rate"] is None else f"{100 * figure['rate']:.1f}"


def markdown(head, rows):
    """A table in markdown, as text."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def print_table(head, rows):
    print(markdown(head, rows), end="")
