"""Networks: which there are, how they are built from a study, what their normalisation and features are called."""
