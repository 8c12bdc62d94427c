"""Training-free sparse self-attention: near blocks of tokens exactly, all others as one pooled key and value each."""
