"""What a visit adds to a survival loss, and its slope, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.44269502162933349609375)  # as float32 has it
LOG2_E_REST: tl.constexpr = tl.constexpr(1.925963033500011e-08)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def log1p(x):
    # log(1 + x) is off by what is rounded away in 1 + x; x / ((1 + x) - 1) puts that right.
    raised = 1.0 + x
    kept = raised - 1.0
    all_rounded = kept == 0.0
    return tl.where(all_rounded, x, tl.log(raised) * (x / tl.where(all_rounded, 1.0, kept)))


@triton.jit
def exp_nonpositive(x):
    if x.dtype == tl.float64:
        power = tl.exp(x)
    else:
        # The GPU has 2^x. Rounding x log2(e) would cost a digit for every power of ten in x, so
        # what rounding took from the product is put back. Below e^-104 float32 has nothing but 0.
        x = tl.where(x < -104.0, -104.0, x)
        scaled = x * LOG2_E
        rest = tl.fma(x, tl.full(x.shape, LOG2_E, x.dtype), -scaled) + x * LOG2_E_REST
        power = tl.exp2(scaled) * (1.0 + rest * LN_2)
    return power


@triton.jit
def signed_zero(x):
    """A derivative of 0 that a value has is -0, and +0 where no value counts, or where it was
    clamped: infinity times the one is NaN in the backward pass, times the other 0 (scaled)."""
    return tl.where(x == 0.0, tl.abs(x) * -1.0, x)  # to Triton a literal -0.0 is 0.0


@triton.jit
def scaled_by(saved, factor):
    """What is saved as +0 stays so whatever it is multiplied by."""
    if saved.dtype == tl.float64:
        counts = saved.to(tl.int64, bitcast=True) != 0
    else:
        counts = saved.to(tl.int32, bitcast=True) != 0
    return tl.where(counts, saved * factor + 0.0, 0.0)


@triton.jit
def nll_of_probabilities(h, event, scale, EPS: tl.constexpr, NLL_OF_EPS: tl.constexpr):
    """-log h at an event, -log(1 - h) elsewhere, and its slope; 0 outside the clamp.

    NLL_OF_EPS is 0 unless 1 - EPS is rounded to 1 (and EPS possibly to 0): the clamp holds then
    too.
    """
    lowest = tl.full(h.shape, EPS, h.dtype)
    highest = tl.full(h.shape, 1.0 - EPS, h.dtype)
    # comparisons, not minimum and maximum: a NaN at risk has to reach the loss
    clamped = tl.where(h < lowest, lowest, h)
    clamped = tl.where(clamped > highest, highest, clamped)
    # of which the logarithm is taken; see log1p for what puts right the rounding of 1 - h
    factor = tl.where(event, clamped, 1.0 - clamped)
    kept = tl.where(event, 1.0, 1.0 - factor)
    all_rounded = kept == 0.0
    ratio = tl.where(event, 1.0, clamped / tl.where(all_rounded, 1.0, kept))
    terms = tl.where(all_rounded, clamped, -tl.log(factor) * ratio)
    slopes = tl.where(event, -scale, scale) / factor
    inside = (h >= lowest) & (h <= highest)
    if NLL_OF_EPS != 0.0:
        inside = inside & (h > 0.0) & (h < 1.0)
        terms = tl.where(tl.where(event, h <= 0.0, h >= 1.0), NLL_OF_EPS, terms)
    return terms, tl.where(inside, signed_zero(slopes), 0.0)


@triton.jit
def nll_of_logits(x, event, scale):
    """softplus(-x) at an event, softplus(x) elsewhere, and its slope."""
    y = tl.where(event, -x, x)
    decay = exp_nonpositive(tl.where(y > 0.0, -y, y))
    terms = tl.where(y > 0.0, y, 0.0) + log1p(decay)
    sigmoid = tl.where(y > 0.0, 1.0, decay) / (1.0 + decay)
    return terms, signed_zero(tl.where(event, -scale, scale) * sigmoid)


@triton.jit
def nll_of_cloglog(x, event, scale):
    """With m = e^x: -log(1 - e^-m) at an event, m elsewhere, and its slope. See ``csrc``."""
    capped = tl.where(event & (x > 7.0), 7.0, x)  # e^-e^7 is 0
    root = exp_nonpositive(tl.where(capped > 0.0, -capped, capped) * 0.5)
    raised = tl.where(capped > 0.0, 1.0 / root, root)
    m = raised * raised
    small = tl.where(m > 1.0, 1.0, m)  # m / (1 - e^-m) - 1, by Bernoulli's numbers
    square = small * small
    series = square * -2.1748686985580619e-16 + 8.5860620562778446e-15
    series = series * square - 3.3896802963225829e-13
    series = series * square + 1.3382536530684679e-11
    series = series * square - 5.2841901386874931e-10
    series = series * square + 2.0876756987868099e-08
    series = series * square - 8.2671957671957672e-07
    series = series * square + 3.3068783068783069e-05
    series = series * square - 0.0013888888888888889
    series = series * square + 0.083333333333333333
    decay = exp_nonpositive(-m)
    large = tl.where(x > 0.0, decay, 0.0)
    excess = tl.where(x > 0.0, large / (1.0 - large), small * 0.5 + square * series)
    of_event = tl.where(x > 0.0, 0.0, -x) + log1p(excess)
    slope = tl.where(x > 0.0, m * excess, decay * (1.0 + excess))
    slopes = tl.where(event, -scale, scale) * tl.where(event, slope, m)
    return tl.where(event, of_event, m), signed_zero(slopes)


@triton.jit
def nll_of_softmax(x, class_of, target, scale, CLASSES: tl.constexpr):
    """-log of the softmax at ``target``, placed at class 0, and its slope by every class."""
    x = tl.where(class_of < CLASSES, x, -float("inf"))
    largest = tl.max(x, axis=2)[:, :, None]
    # 1 + (the others' odds): were the largest logit's 1 added to them, small ones would lose digits
    first_largest = tl.min(tl.where(x == largest, class_of, CLASSES), axis=2)[:, :, None]
    odds = exp_nonpositive(x - largest)
    others = tl.sum(tl.where(class_of == first_largest, 0.0, odds), axis=2)[:, :, None]
    others += largest - largest  # 0, or NaN where softmax is not defined
    chosen = tl.sum(tl.where(class_of == target, x, 0.0), axis=2)[:, :, None]
    terms = (largest - chosen) + log1p(others)
    slopes = odds * (scale / (1.0 + others)) - tl.where(class_of == target, scale, 0.0)
    return tl.where(class_of == 0, terms, 0.0), signed_zero(slopes)
