"""The Ray Serve application that hosts an aligned model."""
