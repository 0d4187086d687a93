"""Forms optimised for the caches and libraries of CPUs; the modules of `models.ops` choose among them."""
