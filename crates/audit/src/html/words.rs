//! The page's words: what each term means, for a reader who has met none of them.

/// Terms and their meaning, in the order in which the page uses them.
pub(crate) const WORDS: [(&str, &str); 14] = [
    (
        "4-bit quantisation",
        "A weight is stored as one of sixteen codes instead of a 16- or 32-bit number. Weights are cut into blocks; a \
         block keeps its largest magnitude (its scale, absmax), and each weight becomes the code whose value times \
         the scale is nearest.",
    ),
    (
        "Block",
        "How many weights share a scale. Small blocks follow the weights more closely; large ones store fewer scales.",
    ),
    (
        "Single and double",
        "Single: scales are kept as 32-bit numbers. Double: the scales, less their mean, are themselves quantised to 8 \
         bits in groups of 256 (QLoRA, arXiv:2305.14314, section 3).",
    ),
    ("NF4", "NormalFloat: its sixteen values are quantiles of the normal distribution, dense near zero (QLoRA)."),
    ("FP4", "A 4-bit floating-point number: sign, two bits of exponent, one of fraction; each value twice the last."),
    ("Int4", "Fifteen evenly spaced values, from -1 to 1 in steps of 1/7."),
    (
        "Mean, max, relative and RMS error",
        "With w a weight and e what it is off after quantising and back: the mean of |e|, the largest |e|, the mean of \
         |e| / (|w| + 1e-8), and the square root of the mean of e squared. Small weights make the relative error large.",
    ),
    (
        "SNR",
        "Signal-to-noise ratio: ten times the decimal logarithm of the sum of w squared over the sum of e squared, in \
         decibels. Six more decibels halve the error.",
    ),
    (
        "Bits a parameter",
        "All that is stored (codes, scales, offsets, padding) over the number of weights. A 16-bit weight takes 16.",
    ),
    (
        "Certificate",
        "No weight can be off by more than a bound that follows from the format: half the widest gap between its \
         values times the block's scale, a little for rounding, and with double quantisation the largest error of the \
         scale itself times the code's value. The page shows the worst weight, its bound, and the margin left; bound \
         used is the largest part of its own bound that any weight takes.",
    ),
    (
        "Near normal, heavy tails, light tails",
        "The shape of a tensor's weights. Excess kurtosis is 0 for a normal distribution, above it where outliers are \
         more common, below it where they are rarer (a uniform has -1.2). Skewness is 0 where both sides are alike.",
    ),
    (
        "Kolmogorov distance",
        "The largest gap between the distribution function of the weights, standardised, and the normal one: 0 for a \
         perfect normal, 0.057 for a uniform.",
    ),
    (
        "Entropy of the codes",
        "How much the codes tell, in bits: 4 where all sixteen are used alike (3.907 for Int4's fifteen), less where a \
         few do most of the work.",
    ),
    (
        "Error as a share of the weights",
        "The error's root mean square over the weights' own: 10 % is an SNR of 20 dB. It compares tensors whose weights \
         differ in size.",
    ),
];
