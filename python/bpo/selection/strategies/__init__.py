"""Which pairs are kept: one function a strategy, all of one signature, and the register of them."""
