"""Sums, means and variances over the elements that count. Masks are True where an element counts."""

from __future__ import annotations

import torch

from src.core.shapes import AnyMask, Anything, Flags, Ids, Indices, Mask, PerToken, Scalar, StopIds


def masked(x: Anything, mask: AnyMask) -> Anything:
    """m x: x where the mask is True, 0 elsewhere, even where x is NaN or infinite there.

    Shapes: x and mask of any shape, the same -> that shape.
    """
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


def masked_mean(x: PerToken, mask: Mask) -> Scalar:
    """sum(m x) / sum(m) over the counted elements; 0 (not NaN) when none counts. Shapes: (B, T) -> scalar."""
    return masked(x, mask).sum() / mask.sum().clamp(min=1)


def masked_variance(x: PerToken, mask: Mask) -> Scalar:
    """sum(m (x - mean)^2) / (n - 1) over the n counted elements; 0 for n < 2. Shapes: (B, T) -> scalar."""
    centered = masked(x - masked_mean(x, mask), mask)
    return centered.square().sum() / (mask.sum() - 1).clamp(min=1)


def whiten(x: PerToken, mask: Mask, *, shift_mean: bool = True) -> PerToken:
    """(x - mean) / sqrt(variance + 1e-8) over the counted elements; with `shift_mean=False` the mean is kept.

    Unbiased variance with the constant inside the root, as TRL and verl do it. Source: detail 12 of "The N
    implementation details of RLHF with PPO" (https://huggingface.co/blog/the_n_implementation_details_of_rlhf_with_ppo).
    Shapes: (B, T) -> (B, T), 0 outside the mask. One counted element gives 0 (itself, when the mean is kept), and so do
    elements that differ by rounding only (standard deviation below 1e-5 of their root mean square).
    """
    x = masked(x, mask)
    mean, scale = masked_mean(x, mask), whitening_scale(x, mask)
    whitened = (x - mean) * scale
    return masked(whitened if shift_mean else whitened + mean, mask)


def whitening_scale(x: PerToken, mask: Mask) -> Scalar:
    """1 / sqrt(variance + 1e-8), by which `whiten` multiplies; 0 where elements differ by rounding only.

    A loss term that is to keep its weight next to whitened advantages is multiplied by the same number.
    Shapes: (B, T) -> scalar.
    """
    x = masked(x, mask)
    variance = masked_variance(x, mask)
    varies = variance > 1e-10 * masked_mean(x.square(), mask)
    return torch.where(varies, torch.rsqrt(variance + 1e-8), torch.zeros_like(variance))


def position_ids(mask: Mask) -> Ids:
    """Position of each counted token among the counted tokens of its row: cumsum(mask) - 1, at least 0.

    With left padding the first real token has position 0, as it has without padding. Shapes: (B, S) -> (B, S) int64.
    """
    return (mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def until_first_stop(response_ids: Ids, stop_ids: StopIds) -> tuple[Mask, Flags]:
    """The mask of a response: True up to and including its first stop token; and whether there is one.

    Built by position, so a padding id that equals a stop id does no harm.
    Shapes: response_ids (B, T), stop_ids (K,) -> mask (B, T) bool, finished (B,) bool.
    """
    stops = torch.isin(response_ids, stop_ids)
    stops_before = stops.long().cumsum(dim=-1) - stops.long()
    return stops_before == 0, stops.any(dim=-1)


def last_counted(mask: Mask) -> Indices:
    """Index of the last counted element in each row; 0 for a row in which none counts. Shapes: (B, T) -> (B,) int64."""
    positions = torch.arange(mask.shape[-1], device=mask.device)
    return (positions * mask.long()).argmax(dim=-1)


def first_counted(mask: Mask) -> Indices:
    """Index of the first counted element in each row; 0 where none counts. Shapes: (B, T) -> (B,) int64."""
    return mask.int().argmax(dim=-1)
