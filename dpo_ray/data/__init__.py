"""Raw rows -> tokenised pairs: sources -> formats -> mixture -> encode -> batching."""
