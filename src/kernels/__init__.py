"""Fast kernels with the same results as the plain operators, most of them for CPUs; one switch (`model.fast_cpu`)."""
