"""Where the GPU's time goes when a student runs in ONNX Runtime, by kernel; a part of onnx_op_cuda.py."""

from collections.abc import Iterator

import torch
from ort_bound import Row, Setting, attempted
from ort_models import Models, title
from timing import synchronize
from torch.profiler import ProfilerActivity

RUNS, SHOWN = 5, 25


def profile(setting: Setting) -> Iterator[Row]:
    """Run the student, without a CUDA graph, and list the kernels that take most of the time."""
    models = Models(setting)
    yield attempted({**title(setting), "what": "student"}, kernels, models)


def kernels(models: Models) -> Row:
    """Milliseconds and launches a run, in all and by kernel, of everything that the process runs on the device."""
    session = models.open("student")
    found = models.check("student", models.run(session))
    device = models.setting.device.type
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as trace:
        for _ in range(RUNS):
            session()
        synchronize(models.setting.device)
    spent = {
        each.key: {"ms": each.self_device_time_total / 1e3 / RUNS, "launches": each.count / RUNS}
        for each in trace.key_averages()
        if each.self_device_time_total
    }
    most = sorted(spent, key=lambda name: -spent[name]["ms"])
    return {
        **found,
        "ms": sum(each["ms"] for each in spent.values()),
        "launches": sum(each["launches"] for each in spent.values()),
        "kernels": [{"name": name[:160], **spent[name]} for name in most[:SHOWN]],
    }
