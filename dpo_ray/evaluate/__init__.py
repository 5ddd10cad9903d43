"""What an aligned model is worth: held-out metrics against its reference."""
