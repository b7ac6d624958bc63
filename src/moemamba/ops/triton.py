"""The ops that have kernels in Triton, one file a family."""
