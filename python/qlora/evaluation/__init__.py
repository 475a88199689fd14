"""What a model in 4 bit predicts: perplexity by weight format."""
