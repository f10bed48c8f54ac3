"""Training: stage 1 (supervised fine-tuning) and what both stages share. Needs the extra `train`."""
