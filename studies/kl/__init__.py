"""The KL to the reference, sampled by k1 or exact: what each adds to the variance of the policy's gradient."""
