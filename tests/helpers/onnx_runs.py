"""Two programs that run ONNX files."""

import numpy as np
import onnx
import onnxruntime
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor


def run_onnxruntime(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, feeds)[0])


def run_evaluator(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> Tensor:
    return torch.from_numpy(np.asarray(ReferenceEvaluator(model).run(None, feeds)[0]))
