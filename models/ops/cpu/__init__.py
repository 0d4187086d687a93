"""Forms optimised for CPU caches and libraries; the operations select among them."""
