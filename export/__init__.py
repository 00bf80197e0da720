"""A pruned tower as a file that others run: serving graph, ONNX, TensorRT and a Triton model repository.

Stands on `patchrank` and `predictors`; every exported graph is compared with PyTorch before it is handed over.
"""
