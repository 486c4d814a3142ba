"""Which devices this machine has, the module that computes on each, and what is copied to them."""
