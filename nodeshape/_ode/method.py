"""The methods: diagonally implicit Runge–Kutta methods, each a value that the loops, gradients and kernels read.

    Y_i     = y_k + h Σ_{j<i} a_ij F_j + h a_ii F_i,    F_i = f(t_k + c_i h, Y_i)
    y_{k+1} = y_k + h Σ b_i F_i                          error ≈ h Σ e_i F_i

A method is explicit where every a_ii is 0. The three methods of the source report have one stage and differ in a
single number, theta = a_11 = c_1. The method whose theta is ``1 - theta``, run with ``-h`` from ``y_{k+1}``, passes
through the same stage and returns to ``y_k``: it is the adjoint method (Hairer, Lubich & Wanner, *Geometric Numerical
Integration*, II.3), and what ``adjoint="reversible"`` undoes a step with.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

Weights = tuple[float, ...]


@dataclass(frozen=True)
class Method:
    """A diagonally implicit Runge–Kutta method of s stages.

    Attributes:
        name: the word users type.
        order: of convergence for smooth problems.
        a: the s rows of the tableau, of 1 to s weights, the last of row i being a_ii.
        b, c: weights and abscissae, s each.
        error: e, the weights minus those of the embedded method, s; empty where there is none.
        error_order: the estimate of a step's error is O(h^error_order); 0 where there is none.
        middle: weights of the state at the middle of a step, s, for dense output; empty for Hermite's cubic.
    """

    name: str
    order: int
    a: tuple[Weights, ...]
    b: Weights
    c: Weights
    error: Weights = ()
    error_order: int = 0
    middle: Weights = ()

    @property
    def explicit(self) -> bool:
        """Whether no stage needs an equation to be solved."""
        return all(row[-1] == 0.0 for row in self.a)

    @property
    def one_stage(self) -> bool:
        """Whether it is one of the theta family, whose steps can be undone."""
        return len(self.b) == 1

    @property
    def theta(self) -> float:
        """Of a method of one stage, where in the step it lies: 0 (start), 1/2 (middle) or 1 (end)."""
        if not self.one_stage:
            raise ValueError(f"{self.name} has {len(self.b)} stages; only methods of one stage have a theta")
        return self.c[0]

    @property
    def starts_with_slope(self) -> bool:
        """Whether the first stage is the state at the start."""
        return self.c[0] == 0.0 and self.a[0] == (0.0,)

    @property
    def ends_with_slope(self) -> bool:
        """Whether the last stage is the state at the end."""
        return self.c[-1] == 1.0 and self.a[-1] == self.b


def _explicit(*rows: Weights) -> tuple[Weights, ...]:
    """Rows of a tableau without their zero diagonal."""
    return tuple((*row, 0.0) for row in ((), *rows))


def _theta(name: str, theta: float, order: int) -> Method:
    return Method(name, order, a=((theta,),), b=(1.0,), c=(theta,))


def _dopri5() -> Method:
    """Dormand & Prince 1980 with Shampine's error weights; middle: Shampine 1986."""
    b = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0)
    embedded = (1951 / 21600, 0.0, 22642 / 50085, 451 / 720, -12231 / 42400, 649 / 6300, 1 / 60)
    return Method(
        "dopri5",
        order=5,
        a=_explicit(
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
            b[:-1],
        ),
        b=b,
        c=(0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
        error=tuple(x - y for x, y in zip(b, embedded)),
        error_order=5,
        middle=(
            6025192743 / 60171106304,
            0.0,
            51252292925 / 130801643196,
            -2691868925 / 90256659456,
            187940372067 / 3189068634112,
            -1776094331 / 39487288512,
            11237099 / 470086768,
        ),
    )


def _tsit5() -> Method:
    """Tsitouras 2011, doi:10.1016/j.camwa.2011.06.002; middle: its interpolant at 1/2."""
    b = (
        0.09646076681806523,
        0.01,
        0.4798896504144996,
        1.379008574103742,
        -3.2900695154360807,
        2.324710524099774,
        0.0,
    )
    return Method(
        "tsit5",
        order=5,
        a=_explicit(
            (0.161,),
            (-0.008480655492356989, 0.335480655492357),
            (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
            (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
            (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
            b[:-1],
        ),
        b=b,
        c=(0.0, 0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0),
        error=(
            -0.0017800110522257714,
            -0.0008164344596567469,
            0.007880878010261995,
            -0.1447110071732629,
            0.5823571654525552,
            -0.45808210592918697,
            1 / 66,
        ),
        error_order=5,
        middle=(
            0.10741235230100377,
            0.01135625,
            0.39560903056045305,
            -0.34475214352593553,
            1.3161853649581645,
            -1.0170608542936508,
            0.03125,
        ),
    )


def _dopri8() -> Method:
    """Prince & Dormand 1981, RK8(7)13M, with the slope at the end as a fourteenth stage.

    middle: the order conditions of a continuous method up to order 5, met exactly, those of order 6 by least squares.
    """
    b = (
        14005451 / 335480064,
        0.0,
        0.0,
        0.0,
        0.0,
        -59238493 / 1068277825,
        181606767 / 758867731,
        561292985 / 797845732,
        -1041891430 / 1371343529,
        760417239 / 1151165299,
        118820643 / 751138087,
        -528747749 / 2220607170,
        1 / 4,
        0.0,
    )
    embedded = (
        13451932 / 455176623,
        0.0,
        0.0,
        0.0,
        0.0,
        -808719846 / 976000145,
        1757004468 / 5645159321,
        656045339 / 265891186,
        -3867574721 / 1518517206,
        465885868 / 322736535,
        53011238 / 667516719,
        2 / 45,
        0.0,
        0.0,
    )
    return Method(
        "dopri8",
        order=8,
        a=_explicit(
            (1 / 18,),
            (1 / 48, 1 / 16),
            (1 / 32, 0.0, 3 / 32),
            (5 / 16, 0.0, -75 / 64, 75 / 64),
            (3 / 80, 0.0, 0.0, 3 / 16, 3 / 20),
            (29443841 / 614563906, 0.0, 0.0, 77736538 / 692538347, -28693883 / 1125000000, 23124283 / 1800000000),
            (
                16016141 / 946692911,
                0.0,
                0.0,
                61564180 / 158732637,
                22789713 / 633445777,
                545815736 / 2771057229,
                -180193667 / 1043307555,
            ),
            (
                39632708 / 573591083,
                0.0,
                0.0,
                -433636366 / 683701615,
                -421739975 / 2616292301,
                100302831 / 723423059,
                790204164 / 839813087,
                800635310 / 3783071287,
            ),
            (
                246121993 / 1340847787,
                0.0,
                0.0,
                -37695042795 / 15268766246,
                -309121744 / 1061227803,
                -12992083 / 490766935,
                6005943493 / 2108947869,
                393006217 / 1396673457,
                123872331 / 1001029789,
            ),
            (
                -1028468189 / 846180014,
                0.0,
                0.0,
                8478235783 / 508512852,
                1311729495 / 1432422823,
                -10304129995 / 1701304382,
                -48777925059 / 3047939560,
                15336726248 / 1032824649,
                -45442868181 / 3398467696,
                3065993473 / 597172653,
            ),
            (
                185892177 / 718116043,
                0.0,
                0.0,
                -3185094517 / 667107341,
                -477755414 / 1098053517,
                -703635378 / 230739211,
                5731566787 / 1027545527,
                5232866602 / 850066563,
                -4093664535 / 808688257,
                3962137247 / 1805957418,
                65686358 / 487910083,
            ),
            (
                403863854 / 491063109,
                0.0,
                0.0,
                -5068492393 / 434740067,
                -411421997 / 543043805,
                652783627 / 914296604,
                11173962825 / 925320556,
                -13158990841 / 6184727034,
                3936647629 / 1978049680,
                -160528059 / 685178525,
                248638103 / 1413531060,
                0.0,
            ),
            b[:-1],
        ),
        b=b,
        c=(
            0.0,
            1 / 18,
            1 / 12,
            1 / 8,
            5 / 16,
            3 / 8,
            59 / 400,
            93 / 200,
            5490023248 / 9719169821,
            13 / 20,
            1201146811 / 1299019798,
            1.0,
            1.0,
            1.0,
        ),
        error=tuple(x - y for x, y in zip(b, embedded)),
        error_order=8,
        middle=(
            0.04435250694797859,
            0.0,
            0.0,
            0.0,
            0.0,
            0.17767020972229103,
            0.22247811667791176,
            0.06346037053635697,
            -0.01432850322234518,
            0.006302013637694337,
            0.00025007099408323524,
            -0.03218297295122783,
            0.045830606121884894,
            -0.013832418464627906,
        ),
    )


def _sdirk2() -> Method:
    """Alexander 1977: L-stable, two stages of one diagonal; the first stage alone is the embedded method."""
    g = 1 - sqrt(2) / 2
    return Method("sdirk2", 2, a=((g,), (1 - g, g)), b=(1 - g, g), c=(g, 1.0), error=(-g, g), error_order=2)


def _trbdf2() -> Method:
    """Bank et al. 1985; Hosea & Shampine 1996, with their embedded method of order 3."""
    g, w = 1 - sqrt(2) / 2, sqrt(2) / 4
    embedded = ((1 - w) / 3, (3 * w + 1) / 3, g / 3)
    return Method(
        "trbdf2",
        2,
        a=((0.0,), (g, g), (w, w, g)),
        b=(w, w, g),
        c=(0.0, 2 * g, 1.0),
        error=tuple(x - y for x, y in zip((w, w, g), embedded)),
        error_order=3,
    )


def _kvaerno3() -> Method:
    """Kværnø 2004, doi:10.1023/B:BITN.0000046811.70614.38: stiffly accurate, order 3 with a third stage of order 2."""
    g = 0.43586652150845899942
    a3 = ((-4 * g * g + 6 * g - 1) / (4 * g), (-2 * g + 1) / (4 * g), g)
    b = ((6 * g - 1) / (12 * g), -1 / ((24 * g - 12) * g), (-6 * g * g + 6 * g - 1) / (6 * g - 3), g)
    return Method(
        "kvaerno3",
        3,
        a=((0.0,), (g, g), a3, b),
        b=b,
        c=(0.0, 2 * g, 1.0, 1.0),
        error=tuple(x - y for x, y in zip(b, (*a3, 0.0))),
        error_order=3,
    )


#: The methods of the source report: one stage, undone by ``adjoint="reversible"``.
SOURCE_METHODS = {
    method.name: method
    for method in (
        _theta("euler", theta=0.0, order=1),
        _theta("implicit_euler", theta=1.0, order=1),
        _theta("implicit_midpoint", theta=0.5, order=2),
    )
}

METHODS = SOURCE_METHODS | {
    method.name: method
    for method in (
        Method("midpoint", 2, a=_explicit((1 / 2,)), b=(0.0, 1.0), c=(0.0, 1 / 2)),
        Method("heun2", 2, a=_explicit((1.0,)), b=(1 / 2, 1 / 2), c=(0.0, 1.0)),
        Method("heun3", 3, a=_explicit((1 / 3,), (0.0, 2 / 3)), b=(1 / 4, 0.0, 3 / 4), c=(0.0, 1 / 3, 2 / 3)),
        Method(
            "rk4",
            4,
            a=_explicit((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
            b=(1 / 8, 3 / 8, 3 / 8, 1 / 8),
            c=(0.0, 1 / 3, 2 / 3, 1.0),
        ),
        Method(
            "adaptive_heun",
            2,
            a=_explicit((1.0,)),
            b=(1 / 2, 1 / 2),
            c=(0.0, 1.0),
            error=(1 / 2, -1 / 2),
            error_order=2,
        ),
        Method(
            "fehlberg2",
            2,
            a=_explicit((1 / 2,), (1 / 256, 255 / 256)),
            b=(1 / 512, 255 / 256, 1 / 512),
            c=(0.0, 1 / 2, 1.0),
            error=(-1 / 512, 0.0, 1 / 512),
            error_order=2,
        ),
        Method(
            "bosh3",
            3,
            a=_explicit((1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
            b=(2 / 9, 1 / 3, 4 / 9, 0.0),
            c=(0.0, 1 / 2, 3 / 4, 1.0),
            error=(2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8),
            error_order=3,
        ),
        _dopri5(),
        _tsit5(),
        _dopri8(),
        Method("trapezoid", 2, a=((0.0,), (1 / 2, 1 / 2)), b=(1 / 2, 1 / 2), c=(0.0, 1.0)),
        _sdirk2(),
        _trbdf2(),
        _kvaerno3(),
    )
}

#: Words of torchdiffeq for what is not offered here, and what to use.
NOT_OFFERED = {
    "explicit_adams": "rk4 or dopri5",
    "implicit_adams": "trapezoid or dopri5",
    "fixed_adams": "rk4 or dopri5",
    "scipy_solver": "kvaerno3 for stiff problems, dopri5 for others",
    "radauIIA3": "kvaerno3",
    "radauIIA5": "kvaerno3",
    "gl4": "implicit_midpoint",
    "gl6": "implicit_midpoint",
}


def get_method(name: str | Method) -> Method:
    """Return the method called ``name``; raise ValueError naming the known ones if there is none."""
    if isinstance(name, Method):
        return name
    if name in NOT_OFFERED:
        raise ValueError(f"method {name!r} is not offered: use {NOT_OFFERED[name]}")
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}: choose one of {', '.join(METHODS)}")
    return METHODS[name]
