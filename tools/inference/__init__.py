"""A trained model on one's own videos: for predict, extract_features and visualize."""
