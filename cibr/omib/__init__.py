"""OMIB (2505.19996): fusion of two or more modalities for a label, through one bottleneck each.

The trainer's contract, on other batches: `output = model(batch)`, `parts = objective(output, batch)`, two stages.  A
batch has "view_0", "view_1", ..., each (n, width), and "target".  `METHODS` names the members of the family.
"""

from cibr.omib.bounds import BetaBounds, beta_bounds, omib_beta_bounds
from cibr.omib.model import METHODS, Fusion, Method, Output
from cibr.omib.objective import Omf, dynamic_ratio, standard_kl
from cibr.omib.tasks import TASKS, Task

__all__ = [
    "METHODS",
    "TASKS",
    "BetaBounds",
    "Fusion",
    "Method",
    "Omf",
    "Output",
    "Task",
    "beta_bounds",
    "dynamic_ratio",
    "omib_beta_bounds",
    "standard_kl",
]
