"""The linear subspace: a mean map and a few component maps, by expectation maximisation with known poses."""
