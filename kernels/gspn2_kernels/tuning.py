"""How the Triton kernels of the line scan share a shape out to warps: a table for the speed, rules that keep it right.

Shapes: B batch, H W grid, C channels, G groups, M positions of the longer line.
"""

from functools import lru_cache
from typing import NamedTuple

LANES = 32


class Plan(NamedTuple):
    """Constants of a kernel, see `triton_tiles`.

    Attributes:
        WC: Warps of a program; they split the channels.
        GRID: Programs that split a line; above 1, a scan takes several launches.
        WP: Warps whose channels one group of loads covers, so that it reads longer runs of memory.
        CL: Lanes that split the channels of a position.
        BC: Channels of a lane.
        P: Positions of a lane.
        NS: Stages of the software pipeline: the loads of NS - 1 lines are under way.
        AHEAD: Read a line one step before it is used.
    """

    WC: int
    GRID: int
    WP: int
    CL: int
    BC: int
    P: int
    NS: int
    AHEAD: bool = False

    @property
    def tile(self) -> int:
        """Channels of a warp."""
        return self.CL * self.BC

    def lines_per_launch(self, height: int, width: int) -> int:
        """Lines that every segment can scan before it needs its neighbours' states."""
        if self.GRID == 1:
            return max(height, width)
        held = LANES // self.CL * self.P
        owned = [-(-positions // self.GRID) for positions in (height, width)]
        return min((held - own) // min(2, self.GRID - 1) for own in owned)


class Rule(NamedTuple):
    """What is chosen for a class of shapes; the rest of a plan follows from the shape.

    Attributes:
        positions: Longest line of the class.
        own: Positions of a segment's own at most; 0 keeps the line in one piece.
        halo: Positions that a segment shares with a neighbour at least: lines of a launch.
        cl: Lanes of a position at most.
        vector: Bytes of a lane's channels at most.
        warps: Warps of a program at most.
        stages: Stages of the pipeline.
        ahead: Read a line ahead.
    """

    positions: int
    own: int
    halo: int
    cl: int
    vector: int
    warps: int
    stages: int
    ahead: bool = False


ENDLESS = 1 << 30
# Each by the number of warps at least, shortest lines first; chosen on an H100 with kernels/benchmarks/tune.py, those
# of planes on an H200. With few warps the time goes by the number of steps: lanes that hold less and take them faster
# pay, as do programs of one warp, which wait for no other.
Rules = tuple[tuple[int, tuple[Rule, ...]], ...]
FEW_WARPS = (0, (Rule(128, 0, 0, 1, 8, 1, 4, ahead=True), Rule(ENDLESS, 32, 16, 1, 8, 1, 4, ahead=True)))
FORWARD: Rules = (
    (
        256,
        (
            Rule(16, 0, 0, 2, 16, 4, 5),
            Rule(80, 0, 0, 2, 16, 4, 4),
            Rule(160, 0, 0, 2, 16, 4, 3),
            Rule(ENDLESS, 64, 16, 2, 16, 4, 3),
        ),
    ),
    (
        64,
        (
            Rule(64, 0, 0, 1, 16, 1, 4, ahead=True),
            Rule(256, 32, 16, 1, 16, 1, 4, ahead=True),
            Rule(ENDLESS, 16, 24, 1, 16, 1, 4, ahead=True),
        ),
    ),
    FEW_WARPS,
)
# Of planes a warp reads whole runs by itself, whatever others do.
PLANES: Rules = (
    (
        256,
        (
            Rule(40, 0, 0, 2, 16, 1, 4, ahead=True),
            Rule(80, 0, 0, 2, 16, 1, 3),
            Rule(160, 0, 0, 2, 16, 2, 3),
            Rule(ENDLESS, 64, 16, 2, 16, 1, 3),
        ),
    ),
    (
        64,
        (
            Rule(64, 0, 0, 1, 16, 1, 4, ahead=True),
            Rule(256, 32, 16, 1, 8, 1, 4, ahead=True),
            Rule(ENDLESS, 16, 24, 1, 16, 1, 4, ahead=True),
        ),
    ),
    FEW_WARPS,
)
# The scan of the backward moves what that of the forward does.
RULES = {"forward": FORWARD, "planes": PLANES, "backward": FORWARD}


@lru_cache(1024)
def plan(
    batch: int, height: int, width: int, channels: int, groups: int, itemsize: int, kernel: str = "forward"
) -> Plan:
    """Choose the constants of a kernel for a shape.

    Args:
        batch: B, at least 1.
        height: H, at least 1.
        width: W, at least 1.
        channels: C.
        groups: G, a divisor of C.
        itemsize: Bytes of a number in memory.
        kernel: "forward", the same of "planes", or "backward".
    """
    positions = max(height, width)
    for least, rules in RULES[kernel]:
        rule = next(rule for rule in rules if positions <= rule.positions)
        chosen = _fit(rule, positions, channels, groups, itemsize)
        if 4 * batch * chosen.GRID * -(-channels // chosen.tile) >= least:
            break
    return chosen


def _fit(rule: Rule, positions: int, channels: int, groups: int, itemsize: int) -> Plan:
    """Fill in what follows from the shape; all channels of a warp belong to one group."""
    group = channels // groups
    vector = max(n for n in (1, 2, 4, 8, 16) if n * itemsize <= max(rule.vector, itemsize) and group % n == 0)
    # The last warp may have lanes beyond C, which do nothing, but none that reach into another group.
    lanes = max(
        n for n in (1, 2) if n <= rule.cl and (group % (n * vector) == 0 or groups == 1 and n * vector <= channels)
    )
    tiles = -(-channels // (lanes * vector))
    # As few idle warps as possible, then as many in a program as possible.
    warps = min((n for n in (1, 2, 4) if n <= rule.warps), key=lambda n: (-(-tiles // n) * n, -n))
    segments = 1
    while rule.own and segments * rule.own < positions:
        segments *= 2
    held = -(-positions // segments) + min(2, segments - 1) * rule.halo
    return Plan(
        WC=warps,
        GRID=segments,
        WP=2 if warps == 4 else 1,
        CL=lanes,
        BC=vector,
        P=-(-held * lanes // LANES),
        NS=rule.stages,
        AHEAD=rule.ahead,
    )
