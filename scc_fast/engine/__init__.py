"""The fast path: the methods on the ops. Without an autograd graph but inside the encoder."""
