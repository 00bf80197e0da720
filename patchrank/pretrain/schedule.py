"""Learning rate over a run: linear warm-up, a plateau, then half a cosine to its end."""

import math


def learning_rate(step: int, num_steps: int, peak: float, num_warmup: int, decay: float, end: float = 0.0) -> float:
    """Rate of step 0 .. num_steps-1: up to the peak in `num_warmup` steps, down to `end` in the last `decay` share.

    Deviation from A-CLIP's and SLIP's released warm-up: it starts at peak / (num_warmup + 1) instead of 1e-6, and step
    `num_warmup` is the first at the peak.
    Source: the half cosine of Loshchilov & Hutter 2017 (SGDR), equation 5; decay 1 is the usual cosine schedule.
    """
    start = max(num_warmup, round((1 - decay) * num_steps))
    if step < num_warmup:
        return peak * (step + 1) / (num_warmup + 1)
    if step < start:
        return peak
    share = 0.5 * (1 + math.cos(math.pi * (step - start) / (num_steps - start)))
    return peak * share if end == 0 else end + (peak - end) * share
