"""Defaults and limits of functions and commands, in a module that a command's `--help` can import at no cost."""

CROP_PCT = 0.875
"""The side of the central crop, as a share of the resized image's shorter side."""
LR_EM = 5e-5
"""The learning rate of the mixture-EM loss (§4.5.2)."""
LR_CONSISTENCY = 1e-4
"""The learning rate of the consistency loss, and of IIC (§4.5.2)."""
GAMMA = 5.0
"""γ of Eq. 4.12."""

MAX_PATHS = 8
"""The largest number of parallel paths of a layer."""
