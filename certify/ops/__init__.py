"""Bound rules of operations, one file per family; every module of this folder registers its own."""
