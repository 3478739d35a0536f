"""The parts of `purestep.optim.Optimizer`."""
