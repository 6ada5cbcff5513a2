"""Training of one phase: the steps, the optimizers, the objective, evaluation and models."""
