"""rlswitch: RLHF on the GPU you have. One accelerator, many tenants, every hand-over proven."""

__version__ = "0.1.0"
