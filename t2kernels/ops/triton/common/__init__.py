"""What every kernel of this folder shares: tile code (``tiles``) and tile sizes (``config``)."""
