"""PPO as pure tensor math: imports torch, jaxtyping, `src.types`, `src.errors` and the standard library alone.

To read in this order: `masking`, `logprobs`, `kl`, `rewards`, `advantages`, `policy_losses`, `value_losses`,
`aggregation`; then `estimators`, the choices of an advantage. The rest when it is needed: `preference` and
`overoptimization` (the reward model), `natural_gradient` (TRPO), `moments`, `diagnostics`, `padding`, `shapes`.
"""
