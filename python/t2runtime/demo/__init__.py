"""The project's main demonstration: `python -m t2runtime demo`, or `make demo`."""
