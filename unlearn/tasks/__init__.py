"""How a model family scores one example: the seam that makes methods family-agnostic."""
