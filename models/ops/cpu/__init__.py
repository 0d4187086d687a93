"""Forms for the caches and the libraries of CPUs; what of them is taken, the operations decide."""
