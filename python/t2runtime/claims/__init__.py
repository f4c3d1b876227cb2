"""Claims: what the paper says, tried here over seeds, confirmed or not. `make claims`."""
