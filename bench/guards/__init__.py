"""What must not get worse unnoticed: ratios to baselines, instructions, launches; the records are in results/."""

from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"
