"""What every runtime needs of a model and a profile, whichever engine runs the model."""
