"""kNN, linear probes, few-shot."""
