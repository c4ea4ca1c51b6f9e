"""The GSPN-2 line scan: reference, torch op and backends."""

from gspn2_kernels.line_scan import backend, line_scan, register_backend
from gspn2_kernels.reference import line_scan_ref

__all__ = ["backend", "line_scan", "line_scan_ref", "register_backend"]
