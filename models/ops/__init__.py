"""Pure functions on tensors: every operation has a plain reference form and, where it pays, faster forms behind it."""
