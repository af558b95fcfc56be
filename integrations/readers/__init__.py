"""How a host computes the loss of the failing batch once more, where that takes more than a few lines."""
