"""What things are, before anything runs: values, states, trees, masks, hyperparameters, and the mathematics of numbers."""
