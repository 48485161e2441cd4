"""A thin trainer for CLIP-like models on the kernels of `cibr_kernels`: `cibr train`, `evaluate`, `plot`, `data`."""
