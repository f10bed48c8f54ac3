"""Building a data set: which samples are hard, what their reasoning says, whether it is good."""
