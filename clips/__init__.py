"""From a file to a uint8 clip: decoding, frame indices, lists, transforms, isolation from bad files."""
