"""What a trained model is measured by, beside the loss of its validation split."""
