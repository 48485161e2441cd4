"""The faults that mutations.py plants in the kernels of GPUs, by family."""

from __future__ import annotations

import gpu_faults_additive
import gpu_faults_dot
import gpu_faults_objective

FAULTS = [*gpu_faults_dot.FAULTS, *gpu_faults_additive.FAULTS, *gpu_faults_objective.FAULTS]
