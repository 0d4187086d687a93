"""Forms for the caches and the libraries of CPUs; the operations choose among them."""
