"""Fast CPU kernels with the same results as the plain operators, behind one switch (`model.fast_cpu`)."""
