"""Test scaffolding: a Python-based Triton back end named `onnxruntime`, for a server that lacks the real one.

It runs inside Triton's Python stub, not in our environment, so it imports nothing of ours. One call of `execute` is one
dynamic batch: its requests are joined, computed in one run, and taken apart again, as the real back end does.
"""

import json
import os
import sys

sys.path.insert(0, os.environ["PATCHRANK_TRITON_PACKAGES"])  # the embedded interpreter ignores PYTHONPATH

import numpy as np
import onnxruntime
import triton_python_backend_utils as triton


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        threads = config.get("parameters", {}).get("intra_op_thread_count", {}).get("string_value", "0")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(threads)
        options.log_severity_level = 3
        options.add_session_config_entry("session.force_spinning_stop", "1")
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        self.session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
        self.inputs = [value["name"] for value in config["input"]]
        self.outputs = [value["name"] for value in config["output"]]

    def execute(self, requests):
        feeds = {
            name: [triton.get_input_tensor_by_name(request, name).as_numpy() for request in requests]
            for name in self.inputs
        }
        sizes = [len(part) for part in feeds[self.inputs[0]]]
        try:
            joined = {name: np.concatenate(parts) for name, parts in feeds.items()}
            values = self.session.run(self.outputs, joined)
        except Exception as error:
            failed = triton.TritonError(str(error))
            return [triton.InferenceResponse(error=failed) for _ in requests]
        ends = np.cumsum(sizes)[:-1]
        parts = zip(*(np.split(value, ends) for value in values))
        return [
            triton.InferenceResponse([triton.Tensor(name, part) for name, part in zip(self.outputs, of_request)])
            for of_request in parts
        ]
