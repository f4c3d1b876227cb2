"""Evidence: the claims of the method, tried on small models, over seeds and with intervals."""
