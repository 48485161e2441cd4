"""The faults that mutations.py plants in the kernels of GPUs, by family."""

from __future__ import annotations

import gpu_faults_additive
import gpu_faults_dot
import gpu_faults_ends
import gpu_faults_objective

FAMILIES = gpu_faults_dot, gpu_faults_additive, gpu_faults_ends, gpu_faults_objective
FAULTS = [fault for family in FAMILIES for fault in family.FAULTS]
