"""The fast path: the methods on the ops, and a runner for the encoder without an autograd graph."""
