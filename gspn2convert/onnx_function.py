"""The ONNX ops `ai.gspn2::LineScan` and `ai.gspn2::AddNorm` and their portable bodies.

Every exported file carries the bodies as model-local functions of standard ops, so it runs in any ONNX Runtime;
a session that registers the project's library runs the library's kernels in their place.

The body of LineScan obeys rules that each come from a runtime that failed: operators as they are since opset 18, no
string attribute, Scan over axis 0 only, lists as tensor-valued Constants, anonymous dimensions inside Scan, fp32
state whatever the inputs are, an initial state that is not computed from the inputs.

Shapes: B batch, H W grid, C channels, G groups of D = C / G channels, K = 3 neighbours; T lines along the scan,
M positions in a line, the leading 2 a direction and its reverse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import onnx

DOMAIN = "ai.gspn2"
NAME = "LineScan"
ADD_NORM = "AddNorm"
VERSION = 1

_INPUTS = """
   zero = Constant <value: tensor = int64 zero {0}> ()
   one = Constant <value: tensor = int64 one {1}> ()
   begin = Constant <value: tensor = int64[1] begin {0}> ()
   back = Constant <value: tensor = int64[1] back {-1}> ()
   before_begin = Constant <value: tensor = int64[1] before_begin {-9223372036854775807}> ()
   column = Constant <value: tensor = int64[3] column {-1, 1, 1}> ()
   direction = Constant <value: tensor = int64[1] direction {3}> ()
   left_middle_right = Constant <value: tensor = int64[3] left_middle_right {-1, 0, 1}> ()
   absent = Constant <value: tensor = float absent {-inf}> ()
   segment = Constant <value_int: int = @segment> ()
   segmented = Greater (segment, zero)

   x_float = Cast <to: int = 1> (x)
   lam_float = Cast <to: int = 1> (lam)
   x_lines = Unsqueeze (x_float, direction)
   scaled = Mul (lam_float, x_lines)
   shape = Shape (lam)
   grid_shape = Shape <end: int = 4> (lam)
   channels = Shape <start: int = 4> (lam)
   groups = Shape <start: int = 4, end: int = 5> (logits)
   group_size = Div (channels, groups)
   grouped = Concat <axis: int = 0> (grid_shape, groups, group_size)
   value = Reshape <allowzero: int = 1> (scaled, grouped)
   value_0, value_1, value_2, value_3 = Split <axis: int = 3, num_outputs: int = 4> (value)

   logits_float = Cast <to: int = 1> (logits)
   minus_logits = Neg (logits_float)
   minus_log_sigmoid = Softplus (minus_logits)
   log_sigmoid = Neg (minus_log_sigmoid)
   log_0, log_1, log_2, log_3 = Split <axis: int = 3, num_outputs: int = 4> (log_sigmoid)
"""

# One pair of opposite directions in one Scan: half as many steps as two, each twice as wide.
# (B, H, W, 1, G, D) -> (T, 1, B, M, G, D), reverse direction flipped, both -> (T, 2, B, M, G, D).
_PAIR = """
   {n}_lines = Shape <start: int = {line_axis}, end: int = {line_axis_end}> (x)
   {n}_line_count = Squeeze ({n}_lines, begin)
   {n}_line = Range (zero, {n}_line_count, one)
   {n}_period = Where (segmented, segment, {n}_line_count)
   {n}_phase = Mod ({n}_line, {n}_period)
   {n}_keep = Greater ({n}_phase, zero)

   {n}_positions = Shape <start: int = {position_axis}, end: int = {position_axis_end}> (x)
   {n}_position_count = Squeeze ({n}_positions, begin)
   {n}_position = Range (zero, {n}_position_count, one)
   {n}_position_column = Reshape ({n}_position, column)
   {n}_neighbour = Add ({n}_position_column, left_middle_right)
   {n}_from_first = GreaterOrEqual ({n}_neighbour, zero)
   {n}_to_last = Less ({n}_neighbour, {n}_position_count)
   {n}_exists = And ({n}_from_first, {n}_to_last)

   {n}_value_forth = Transpose <perm: ints = [{to_lines}]> (value_{forth})
   {n}_value_back = Transpose <perm: ints = [{to_lines}]> (value_{back})
   {n}_value_flipped = Slice ({n}_value_back, back, before_begin, begin, back)
   {n}_value = Concat <axis: int = 1> ({n}_value_forth, {n}_value_flipped)

   {n}_log_forth = Transpose <perm: ints = [{to_lines}]> (log_{forth})
   {n}_log_back = Transpose <perm: ints = [{to_lines}]> (log_{back})
   {n}_log_flipped = Slice ({n}_log_back, back, before_begin, begin, back)
   {n}_log = Concat <axis: int = 1> ({n}_log_forth, {n}_log_flipped)
   {n}_masked = Where ({n}_exists, {n}_log, absent)
   {n}_weights = Softmax <axis: int = 5> ({n}_masked)
   {n}_left, {n}_middle, {n}_right = Split <axis: int = 5, num_outputs: int = 3> ({n}_weights)

   {n}_state_shape = Shape <start: int = 1> ({n}_value)
   {n}_start = ConstantOfShape <value: tensor = float[1] start {{0.0}}> ({n}_state_shape)
   {n}_last, {n}_h = Scan <num_scan_inputs: int = 5, body = {n}_step (
      float[?,?,?,?,?] previous, bool keep, float[?,?,?,?,?] left, float[?,?,?,?,?] middle, float[?,?,?,?,?] right,
      float[?,?,?,?,?] line_value) => (float[?,?,?,?,?] state, float[?,?,?,?,?] line_h)
   {{
      nothing = Constant <value: tensor = float nothing {{0.0}}> ()
      middle_h = Where (keep, previous, nothing)
      pads = Constant <value: tensor = int64[10] pads {{0, 0, 1, 0, 0, 0, 0, 1, 0, 0}}> ()
      padded = Pad (middle_h, pads)
      axis = Constant <value: tensor = int64[1] axis {{2}}> ()
      left_begin = Constant <value: tensor = int64[1] left_begin {{0}}> ()
      left_end = Constant <value: tensor = int64[1] left_end {{-2}}> ()
      right_begin = Constant <value: tensor = int64[1] right_begin {{2}}> ()
      right_end = Constant <value: tensor = int64[1] right_end {{9223372036854775807}}> ()
      left_h = Slice (padded, left_begin, left_end, axis)
      right_h = Slice (padded, right_begin, right_end, axis)
      from_left = Mul (left, left_h)
      from_middle = Mul (middle, middle_h)
      from_right = Mul (right, right_h)
      state = Sum (from_left, from_middle, from_right, line_value)
      line_h = Identity (state)
   }}> ({n}_start, {n}_keep, {n}_left, {n}_middle, {n}_right, {n}_value)

   {n}_h_forth, {n}_h_flipped = Split <axis: int = 1, num_outputs: int = 2> ({n}_h)
   {n}_h_back = Slice ({n}_h_flipped, back, before_begin, begin, back)
   h_{forth} = Transpose <perm: ints = [{to_grid}]> ({n}_h_forth)
   h_{back} = Transpose <perm: ints = [{to_grid}]> ({n}_h_back)
"""

_OUTPUT = """
   h_grouped = Concat <axis: int = 3> (h_0, h_1, h_2, h_3)
   h = Reshape <allowzero: int = 1> (h_grouped, shape)
   u_float = Cast <to: int = 1> (u)
   y_float = Mul (u_float, h)
   y_typed = CastLike (y_float, x)
   y = Reshape <allowzero: int = 1> (y_typed, shape)
"""

_ADD_NORM = """
   biased = Add (update, bias)
   sum = Add (x, biased)
   normed = LayerNormalization <axis: int = -1, epsilon: float = @epsilon> (sum, scale, shift)
"""


def line_scan_text(opset: int) -> str:
    """The body in ONNX's textual form, for a model of that opset."""
    head = f'<opset_import: ["" : {opset}], domain: "{DOMAIN}">\n{NAME} <segment> (x, lam, logits, u) => (y)'
    rows = _pair("rows", forth=0, line_axis=1, position_axis=2, to_grid="2, 0, 3, 1, 4, 5")
    columns = _pair("columns", forth=2, line_axis=2, position_axis=1, to_grid="2, 3, 0, 1, 4, 5")
    return "\n".join([head, "{", _INPUTS, rows, columns, _OUTPUT, "}"])


def add_norm_text(opset: int) -> str:
    """The body of AddNorm, as `line_scan_text`."""
    head = f'<opset_import: ["" : {opset}], domain: "{DOMAIN}">'
    return f"{head}\n{ADD_NORM} <epsilon> (x, update, bias, scale, shift) => (sum, normed) {{{_ADD_NORM}}}"


def _pair(prefix: str, *, forth: int, line_axis: int, position_axis: int, to_grid: str) -> str:
    return _PAIR.format(
        n=prefix,
        forth=forth,
        back=forth + 1,
        line_axis=line_axis,
        line_axis_end=line_axis + 1,
        position_axis=position_axis,
        position_axis_end=position_axis + 1,
        to_lines=f"{line_axis}, 3, 0, {position_axis}, 4, 5",
        to_grid=to_grid,
    )


def line_scan_function(opset: int) -> onnx.FunctionProto:
    """Build the function `ai.gspn2::LineScan(x, lam, logits, u; segment)`.

    Args:
        opset: the default-domain opset of the model it goes into; the checker wants the two equal.

    Returns:
        The function; inputs and output as `gspn2_kernels.line_scan` defines them.
    """
    from onnx import parser

    function = parser.parse_function(line_scan_text(opset))
    function.doc_string = "GSPN-2 line scan in four directions (arXiv 2512.07884): down, up, right, left."
    return function


def add_norm_function(opset: int) -> onnx.FunctionProto:
    """Build the function `ai.gspn2::AddNorm(x, update, bias, scale, shift; epsilon)`.

    sum = x + update + bias, and normed = LayerNorm(sum) * scale + shift over the last axis. x, update, sum and normed
    are (..., C), scale and shift (C), bias (C) or (1).

    Args:
        opset: as for `line_scan_function`.
    """
    from onnx import parser

    function = parser.parse_function(add_norm_text(opset))
    function.doc_string = "A residual sum and its LayerNorm."
    return function


def line_scan_translation() -> dict[Any, Callable[..., Any]]:
    """The `custom_translation_table` that turns each torch op `gspn2::line_scan` into one opaque node.

    The exporter inlines every function it knows, so the body is attached after it has finished.
    """
    from onnx.defs import OpSchema
    from onnxscript import values

    schema = OpSchema(
        NAME,
        DOMAIN,
        VERSION,
        inputs=[OpSchema.FormalParameter(name, "T") for name in ("x", "lam", "logits", "u")],
        outputs=[OpSchema.FormalParameter("y", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "")],
        attributes=[OpSchema.Attribute("segment", OpSchema.AttrType.INT, "", required=True)],
    )
    node = values.Op(values.Opset(DOMAIN, VERSION), NAME, schema)

    def line_scan(x: Any, lam: Any, logits: Any, u: Any, segment: int) -> Any:  # noqa: ANN401
        return node(x, lam, logits, u, segment=segment)

    return {torch.ops.gspn2.line_scan.default: line_scan}
