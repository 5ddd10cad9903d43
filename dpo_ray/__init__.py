"""dpo-ray: preference alignment of language models on a Ray cluster. Importing this loads nothing heavy."""

__version__ = "0.1.0"
