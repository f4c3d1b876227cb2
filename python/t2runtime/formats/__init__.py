"""Into and out of other formats: the authors' files, plain checkpoints, LoRA adapters."""
