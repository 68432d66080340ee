"""What predict.py and extract_features.py share: a trained model, its clips, and files of features."""
