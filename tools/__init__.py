"""What stays out of the wheel: the training of the demo model, the simulator, and what tests and benchmarks share."""
