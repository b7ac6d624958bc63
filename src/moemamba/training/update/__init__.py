"""One step of the optimiser: loss, gradients, update, and what is withheld."""
