"""The model: reasoner, semantic-guided prompt adapter, segmenter, and the processor that feeds them."""
