"""What tools/export.py uses: models as Hugging Face's VideoMAE, and the card that goes with exported weights."""
