"""What keeps a GPU busy: fewer launches, larger kernels."""
