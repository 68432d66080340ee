"""What a pre-training model does with a clip, as pictures."""
