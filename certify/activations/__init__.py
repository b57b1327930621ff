"""Facts about univariate functions; every module of this folder registers the activations it describes."""
