"""A new category in an hour: from a folder of pictures to a fine-tuned model and a report of what it is worth."""
