"""The embedded default, `nano`: its vision tower, and beside it the weights, the tokenizer and the model card."""
