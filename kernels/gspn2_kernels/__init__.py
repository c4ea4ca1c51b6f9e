"""The operators of a GSPN-2 mixer: the line scan and the parts around it, as torch ops with backends."""

from gspn2_kernels.beside import beside
from gspn2_kernels.gated import gated_scan
from gspn2_kernels.line_scan import backend, line_scan, register_backend
from gspn2_kernels.local import local_perception
from gspn2_kernels.merge import divide, merge
from gspn2_kernels.norm import Normed, layer_norm, norm_and_sum, norm_tokens
from gspn2_kernels.prefix import read_prefix
from gspn2_kernels.project import project
from gspn2_kernels.reference import line_scan_ref

__all__ = [
    "Normed",
    "backend",
    "beside",
    "divide",
    "gated_scan",
    "layer_norm",
    "line_scan",
    "line_scan_ref",
    "local_perception",
    "merge",
    "norm_and_sum",
    "norm_tokens",
    "project",
    "read_prefix",
    "register_backend",
]
