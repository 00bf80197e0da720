"""What pruning costs and gains: accuracy, retrieval, throughput and rival methods at equal compute.

Stands on `patchrank` and `predictors`.
"""
