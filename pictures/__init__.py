"""What a pre-training model does with a clip, as pictures; plots of a run and its test."""
