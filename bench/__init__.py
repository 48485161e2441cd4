"""The benchmark: `python bench/`, cases as data and one measuring function."""
