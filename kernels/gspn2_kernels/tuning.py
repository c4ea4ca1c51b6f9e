"""How the Triton kernels of the line scan share a shape out to warps: a table for the speed, rules that keep it right.

Shapes: B batch, H W grid, C channels, G groups, M positions of the longer line.
"""

from functools import lru_cache
from typing import NamedTuple

LANES = 32
ENDLESS = 1 << 30
# Bytes of shared memory that a program has on an H100.
SHARED = 227 * 1024


class Plan(NamedTuple):
    """Constants of a kernel, see `triton_tiles`.

    Attributes:
        WC: Warps of a program; they split the positions.
        GRID: Programs that split a line; above 1, a scan takes several launches.
        CL: Lanes that split the channels of a position.
        BC: Channels of a lane.
        P: Positions of a lane.
        NS: Stages of the software pipeline: the loads of NS - 1 lines are under way.
        AHEAD: Read a line one step before it is used.
        APART: Take weights that a launch before made, instead of logits.
    """

    WC: int
    GRID: int
    CL: int
    BC: int
    P: int
    NS: int
    AHEAD: bool = False
    APART: bool = False

    @property
    def held(self) -> int:
        """Positions that the lanes of a program hold."""
        return LANES * self.WC // self.CL * self.P

    @property
    def tile(self) -> int:
        """Channels of a program."""
        return self.CL * self.BC

    def shares(self, group: int) -> bool:
        """Tell whether the lanes that share positions each normalise the logits of one, and pass its weights on.

        There must be several positions and a lane for each, and all channels of a program be of a group of so many.
        """
        return not self.APART and 1 < self.P <= self.CL and group % self.tile == 0

    def shared(self, itemsize: int) -> int:
        """Bytes of shared memory that a program takes at most, for numbers of so many bytes."""
        weights = 8 if self.APART else 4 * itemsize
        lines = (self.NS - 1) * self.held * self.CL * (3 * self.BC * itemsize + weights)
        return lines + (4 * LANES * self.WC * self.BC if self.WC > 1 else 0)

    def lines_per_launch(self, height: int, width: int) -> int:
        """Lines that every segment can scan before it needs its neighbours' states."""
        if self.GRID == 1:
            return max(height, width)
        owned = [-(-positions // self.GRID) for positions in (height, width)]
        return min((self.held - own) // min(2, self.GRID - 1) for own in owned)


class Rule(NamedTuple):
    """What is chosen for a class of shapes; the rest of a plan follows from the shape.

    Attributes:
        positions: Longest line of the class.
        own: Positions of a segment's own at most; 0 keeps the line in one piece.
        halo: Positions that a segment shares with a neighbour at least: lines of a launch.
        cl: Lanes of a position at most.
        vector: Bytes of a lane's channels at most.
        warps: Warps of a program at most; they split the positions.
        stages: Stages of the pipeline.
        ahead: Read a line ahead.
        apart: Normalise logits in a launch of their own.
        share: If apart, then not where lanes can share that out, see `Plan.shares`.
        pixel: Bytes of a pixel's channels at most, times the groups: of more groups a lane holds fewer channels.
        whole: Only where a program holds all channels of a pixel.
    """

    positions: int
    own: int
    halo: int
    cl: int
    vector: int
    warps: int
    stages: int
    ahead: bool = False
    apart: bool = True
    share: bool = False
    pixel: int = ENDLESS
    whole: bool = False


# Each by the number of warps at least, shortest lines first; chosen on H200s with kernels/benchmarks/tune.py. With few
# warps the time goes by the number of steps: lanes that hold less and take them faster pay.
Rules = tuple[tuple[int, tuple[Rule, ...]], ...]
# Of grids that the memory must keep up with.
SHORT_AND_WHOLE = Rule(16, 0, 0, 8, 16, 2, 3, apart=False, whole=True)
SMALL_AND_WHOLE = Rule(32, 0, 0, 8, 16, 2, 4, share=True, whole=True)
SHORT, SMALL = Rule(16, 0, 0, 8, 16, 2, 4, apart=False), Rule(32, 0, 0, 4, 16, 2, 4, ahead=True)
SHORTER = (SHORT_AND_WHOLE, SHORT, SMALL_AND_WHOLE, SMALL)
MIDDLE, LARGE, LONG = (
    Rule(80, 0, 0, 8, 16, 4, 4, apart=False),
    Rule(160, 0, 0, 8, 16, 8, 4, share=True),
    Rule(ENDLESS, 64, 32, 8, 16, 8, 4, share=True),
)
MANY = (*SHORTER, MIDDLE, LARGE, LONG)
# Where every multiprocessor has such lines: logits, whose directions lie side by side, are then read once.
LARGE_OF_MANY = LARGE._replace(stages=3, share=False)
# Segments of few channels may be longer if all multiprocessors have one even so: fewer bytes of halos.
LONG_AND_NARROW = Rule(ENDLESS, 256, 32, 2, 16, 8, 4, pixel=32)
# Of single images.
SMALL_OF_SOME, LARGE_OF_SOME = Rule(64, 0, 0, 2, 16, 4, 4, ahead=True), Rule(256, 32, 16, 1, 16, 1, 4, ahead=True)
LONG_OF_FEW, LONG_OF_SOME = (
    Rule(ENDLESS, 32, 16, 1, 8, 1, 4, ahead=True),
    Rule(ENDLESS, 16, 24, 1, 16, 1, 4, ahead=True),
)
# A program of one warp waits for no other; several take a line fastest with a position a lane.
ALONE, LARGE_TOGETHER = Rule(64, 0, 0, 1, 16, 1, 4, ahead=True), Rule(256, 64, 32, 1, 16, 4, 4, ahead=True)
TOGETHER = (SMALL_OF_SOME._replace(stages=8), LARGE_TOGETHER, Rule(ENDLESS, 16, 24, 2, 8, 4, 10))
# The second level of 256 counts the warps of its own plans. Lines longer than 256 always have as many.
FORWARD: Rules = (
    (1024, (*SHORTER, MIDDLE, LARGE_OF_MANY, LONG_AND_NARROW, LONG)),
    (256, MANY),
    (256, TOGETHER),
    (128, (SMALL_OF_SOME._replace(positions=16), ALONE, LARGE_TOGETHER)),
    (0, (ALONE._replace(positions=128), LONG_OF_FEW)),
)
BACKWARD: Rules = (
    (1024, (*SHORTER, MIDDLE, LARGE._replace(stages=3), LONG)),
    (256, MANY),
    (64, (SMALL_OF_SOME, LARGE_OF_SOME, LONG_OF_SOME)),
    (0, (Rule(128, 0, 0, 1, 8, 1, 4, ahead=True), LONG_OF_FEW)),
)
# A forward that keeps states writes more: its longer lines are as fast with fewer under way.
MIDDLE_OF_STATES = MIDDLE._replace(stages=3, apart=True, share=True)
OF_STATES = (*SHORTER, MIDDLE_OF_STATES._replace(positions=64, stages=4), MIDDLE_OF_STATES)
LONG_OF_STATES = LONG._replace(share=False)
TRAIN: Rules = (
    (1024, (*OF_STATES, LARGE_OF_MANY, LONG_OF_STATES)),
    (256, (*OF_STATES, LARGE, LONG_OF_STATES)),
    (128, TOGETHER),
    *BACKWARD[-2:],
)
# Of planes a lane reads runs of memory whichever channels it has: with few warps a position a lane pays in long lines
# of few channels too. Measured at 64, 128, 256, 300 and 512 lines of one image, and 128 of four.
OF_TWO_WARPS, OF_PLANES = Rule(64, 0, 0, 1, 16, 2, 4, ahead=True), LARGE_TOGETHER._replace(positions=ENDLESS)
MIDDLE_OF_PLANES = LARGE_TOGETHER._replace(positions=160)
LONG_OF_PLANES = (Rule(ENDLESS, 32, 48, 1, 16, 4, 8, ahead=True, pixel=64), OF_PLANES)
# Each level counts the warps of its own plans: for 640 it takes a few images of 81 to 160 lines.
PLANES: Rules = (
    (512, (SHORT, SMALL, MIDDLE, LARGE_OF_MANY, LONG)),
    (640, (SHORT, SMALL, MIDDLE, MIDDLE_OF_PLANES._replace(cl=2, warps=8), LONG)),
    (256, (SHORT, SMALL, MIDDLE, MIDDLE_OF_PLANES, LONG._replace(positions=256), *LONG_OF_PLANES)),
    (128, (SMALL_OF_SOME, OF_PLANES)),
    (64, (SMALL_OF_SOME._replace(positions=32), OF_TWO_WARPS, OF_PLANES)),
    (0, (Rule(32, 0, 0, 2, 8, 4, 4, ahead=True), OF_TWO_WARPS, OF_PLANES)),
)
RULES = {"forward": FORWARD, "train": TRAIN, "planes": PLANES, "backward": BACKWARD}


@lru_cache(1024)
def plan(
    batch: int,
    height: int,
    width: int,
    channels: int,
    groups: int,
    itemsize: int,
    kernel: str = "forward",
    *,
    shared: int = SHARED,
) -> Plan:
    """Choose the constants of a kernel for a shape.

    Args:
        batch: B, at least 1.
        height: H, at least 1.
        width: W, at least 1.
        channels: C.
        groups: G, a divisor of C.
        itemsize: Bytes of a number in memory.
        kernel: "forward", "train" where states are kept, "planes" of a latent's scans, or "backward".
        shared: Bytes of shared memory that a program may take.
    """
    positions = max(height, width)
    for least, rules in RULES[kernel]:
        fitting = (r for r in rules if positions <= r.positions and channels * groups * itemsize <= r.pixel)
        plans = ((r, _fit(r, positions, channels, groups, itemsize, shared)) for r in fitting)
        chosen = next(made for r, made in plans if not r.whole or made.tile >= channels)
        if 4 * batch * chosen.GRID * chosen.WC * -(-channels // chosen.tile) >= least:
            break
    # Numbers that a step just hands on to the next, as a forward does with u in fp32, Triton does not copy lines ahead.
    return chosen._replace(AHEAD=chosen.AHEAD and (itemsize == 2 or kernel == "backward"))


def _fit(rule: Rule, positions: int, channels: int, groups: int, itemsize: int, shared: int) -> Plan:
    """Fill in what follows from the shape; all channels of a lane belong to one group."""
    group = channels // groups
    vector = max(n for n in (1, 2, 4, 8, 16) if n * itemsize <= max(rule.vector, itemsize) and group % n == 0)
    # As few idle lanes as possible, then as many channels in a program as possible.
    lanes = min((n for n in (1, 2, 4, 8) if n <= rule.cl), key=lambda n: (-(-channels // (n * vector)) * n, -n))
    segments = 1
    while rule.own and segments * rule.own < positions:
        segments *= 2
    held = -(-positions // segments) + min(2, segments - 1) * rule.halo
    warps = min(rule.warps, 1 << max(0, -(-held * lanes // LANES) - 1).bit_length())
    chosen = Plan(
        WC=warps,
        GRID=segments,
        CL=lanes,
        BC=vector,
        P=-(-held * lanes // (LANES * warps)),
        NS=rule.stages,
        AHEAD=rule.ahead,
        APART=rule.apart,
    )
    together = chosen._replace(APART=False)
    if rule.share and together.shares(group):
        chosen = together
    # Where shared memory is smaller, first fewer lines under way, then fewer channels.
    while chosen.shared(itemsize) > shared and chosen.NS > 2:
        chosen = chosen._replace(NS=chosen.NS - 1)
    if chosen.shared(itemsize) > shared and rule.cl > 1:
        return _fit(rule._replace(cl=rule.cl // 2), positions, channels, groups, itemsize, shared)
    return chosen
