"""The limits of what a solve may be told, each from both sides; and how a call is understood."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import nodeshape as ns
from nodeshape._ode import backend, options
from nodeshape._ode.backend import Request, default_method
from nodeshape._ode.method import METHODS
from nodeshape._ode.odeint import check_resolution, tensors_of, times_of
from nodeshape._ode.options import MOST_ITERATIONS, MOST_STEPS, UniformGrid, read_options, steps_of

INF, NAN = float("inf"), float("nan")


def decay(t: Tensor, y: Any) -> Any:
    return -y


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_num_steps", [1, 2.0, torch.tensor(3), MOST_ITERATIONS]),
        ("step_size", [5e-324, 1, 1e308]),
        ("min_step", [0, 0.0, 1.0, INF]),
        ("interp", ["linear", "cubic"]),
        ("perturb", [True, False]),
        ("grid_constructor", [decay]),
        ("norm", ["seminorm", decay]),
        ("step_t", [[], [0, 1.5], torch.tensor([1.0]), (-1e308,)]),
        ("adjoint_method", ["rk4"]),
        ("stage_solver", ["anderson", "newton", "krylov"]),
        ("max_step", [None]),
    ],
)
def test_an_option_within_its_limits_is_taken(name: str, values: list[Any]) -> None:
    for value in values:
        taken = read_options({name: value})
        assert (taken == {}) if value is None else (taken[name] is value or taken[name] == value)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (
            "max_num_steps",
            [0, 0.5, 1.5, -1, INF, NAN, "1"],
            "option 'max_num_steps' must be a whole number, at least 1",
        ),
        ("max_num_steps", [MOST_ITERATIONS + 1], "option 'max_num_steps' must be at most 2147483647"),
        ("step_size", [0, -1.0, INF, NAN], "step_size must be a positive number"),
        ("min_step", [-1e-300, NAN], "min_step must be a number of at least 0"),
        ("interp", ["quadratic"], "unknown interp 'quadratic': choose 'linear' or 'cubic'"),
        ("perturb", [1, 0, "True"], "perturb must be True or False"),
        ("grid_constructor", [3], "grid_constructor must be a function"),
        ("norm", ["halfnorm"], "norm must be a function"),
        ("step_t", [[INF], [0.0, NAN], ["0"]], "step_t must be finite times"),
        ("adjoint_method", ["rk5"], "unknown method 'rk5'"),
        ("adjoint_options", [{"rk4": 1}], "unknown option 'rk4'"),
        ("maximum", [1, None], "unknown option 'maximum': known are step_size"),
    ],
)
def test_an_option_out_of_its_limits_is_refused(name: str, values: list[Any], message: str) -> None:
    for value in values:
        with pytest.raises(ValueError, match=message):
            read_options({name: value})


def test_steps_are_given_once_and_within_limits() -> None:
    for steps, size in [(None, None), (1, None), (MOST_STEPS, None), (None, 0.1)]:
        options.check_steps(steps, size)
    for steps, size in [(1, 0.1), (MOST_STEPS + 1, None), (0, None), (None, 0.0), (2.5, None)]:
        with pytest.raises(ValueError, match="step"):
            options.check_steps(steps, size)  # type: ignore[arg-type]


def test_an_interval_takes_the_fewest_steps_that_are_not_longer() -> None:
    cases = [(1.0, 1.0, 1), (1.0, 0.25, 4), (1.0, 0.3, 4), (-1.0, 0.3, 4), (1e-12, 1.0, 1), (1.0 + 1e-7, 0.25, 4)]
    for length, size, steps in cases:
        assert steps_of(length, size) == steps
    assert MOST_STEPS / 2 < steps_of(1.0, 1.0001e-7) <= MOST_STEPS
    with pytest.raises(ValueError, match="cuts an interval into more than 10000000 steps"):
        steps_of(1.0, 0.9999e-7)


@pytest.mark.parametrize("times", [[0.0, 0.7, 1.0], [1.0, 0.2, 0.0]])
def test_a_grid_goes_from_the_first_time_to_the_last(times: list[float]) -> None:
    sign = 1.0 if times[-1] > times[0] else -1.0
    expected = [times[0] + sign * x for x in (0.0, 0.3, 0.6, 0.9)] + [times[-1]]
    assert UniformGrid(0.3).points(times) == pytest.approx(expected)
    assert UniformGrid(0.3)(None, None, torch.tensor(times)).tolist() == pytest.approx(expected)


# ---- times and states ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "t", [[1.0], [0, 1], (1.0, 0.5, 0.0), torch.tensor([0, 2, 3]), torch.tensor([-1e38, 0.0, 2e38])]
)
def test_times_are_numbers(t: Any) -> None:
    tensor, numbers = times_of(t)
    assert numbers == [float(x) for x in t] and all(type(x) is float for x in numbers)
    assert tensor.tolist() == numbers


@pytest.mark.parametrize(
    ("t", "message"),
    [
        ([], "t must hold at least one time, got none"),
        (torch.ones(2, 2), r"t must have one dimension, \[times\], got shape \[2, 2\]"),
        (torch.tensor(1.0), r"t must have one dimension, \[times\], got shape \[\]"),
        ([0.0, 0.0], "t must be finite and strictly increasing or decreasing"),
        ([0.0, 1.0, 1.0], "t must be finite and strictly increasing or decreasing"),
        ([1.0, 0.0, 0.0], "t must be finite and strictly increasing or decreasing"),
        ([0.0, 1.0, 0.5], "t must be finite and strictly increasing or decreasing"),
        ([NAN], "t must be finite and strictly increasing or decreasing"),
        ([0.0, INF], "t must be finite and strictly increasing or decreasing"),
        ([-1e308, 1e308], "t must have finite intervals"),
    ],
)
def test_times_that_are_none_are_refused(t: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        times_of(t)


def test_a_state_is_tensors_of_one_kind() -> None:
    one, two = torch.ones(2), torch.zeros(3)
    assert tensors_of(one) == (one,) and tensors_of((one, two)) == (one, two)
    assert tensors_of(one.to(torch.complex64))[0].is_complex()
    for wrong in ((), [one], (one, 1.0), 1.0, None):
        with pytest.raises(TypeError, match="y0 must be a tensor or a tuple of tensors"):
            tensors_of(wrong)  # type: ignore[arg-type]
    for state, message in [
        ((one, two.double()), "must share dtype and device, got torch.float32 on cpu, torch.float64 on cpu"),
        (one.int(), "y0 must be floating-point or complex, got torch.int32"),
        ((one.int(), two.int()), "y0 must be floating-point or complex, got torch.int32"),
    ]:
        with pytest.raises(ValueError, match=message):
            tensors_of(state)


@pytest.mark.parametrize(
    ("times", "steps", "size", "adaptive", "fine"),
    [
        ([1e6], 10, None, False, True),
        ([1e6, 1e6 + 1], 1, None, False, True),
        ([1e6, 1e6 + 1], None, None, False, True),
        ([1e6, 1e6 + 1], 2, None, False, True),
        ([1e6, 1e6 + 1], 3, None, False, False),
        ([-1e6 - 1, -1e6], 3, None, False, False),
        ([1e6 + 1, 1e6], 3, None, False, False),
        ([1e6, 1e6 + 1], 3, None, True, True),
        ([1e6, 1e6 + 0.4], 1, None, True, False),
        ([0.0, 1.0, 1e6, 1e6 + 0.4], 1, None, False, False),
        ([0.0, 1e6], 1, None, False, True),
        ([1e6, 1e6 + 1], None, 0.5, False, True),
        ([1e6, 1e6 + 1], None, 0.4, False, False),
        ([1e6, 1e6 + 1], None, 2.0, False, True),
        ([0.0, 1e7], None, 4.8, False, True),  # at the limit
        ([1e6, 1e6 + 1], None, 1e-31, False, True),  # which is refused for being too many
    ],
)
def test_steps_are_told_apart_in_float32(
    times: list[float], steps: int | None, size: float | None, adaptive: bool, fine: bool
) -> None:
    for dtype in (torch.float64, torch.complex128):
        check_resolution(torch.ones(1, dtype=dtype), times, steps, size, adaptive)
    for dtype in (torch.float32, torch.bfloat16, torch.complex64):
        if fine:
            check_resolution(torch.ones(1, dtype=dtype), times, steps, size, adaptive)
        else:
            with pytest.raises(ValueError, match="too coarse for steps of"):
                check_resolution(torch.ones(1, dtype=dtype), times, steps, size, adaptive)


# ---- calls -----------------------------------------------------------------------------------------------------------

Y0 = torch.ones(2, 3, dtype=torch.float64)
EVENT = {"event_fn": lambda t, y: y.sum() - 1}
OWN = torch.tensor([[0.0, 0.0], [1.0, 2.0]])


@pytest.mark.parametrize(
    "arguments",
    [
        {"rtol": 0.0},
        {"atol": 0.0},
        {"rtol": torch.tensor([0.0, 1e-3, 1e-3])},
        {"rtol": 0.0, "atol": torch.full((3,), 1e-6)},
        {"rtol": 1e-3, "atol": torch.tensor([0.0, 0.0, 1e-6])},
        {"method": "rk4"},
        {"method": "rk4", "steps": 2, "return_stats": True},
        {"options": {"step_control": "per_sample"}},
        {"options": {"on_failure": "nan"}},
        {"t": OWN, "step_size": 0.5, "method": "rk4"},
        {"t": -OWN, "method": "rk4", "step_size": 0.5},
        {"t": OWN[:1]},
    ],
)
def test_a_call_within_its_limits_solves(arguments: dict[str, Any]) -> None:
    given = {"t": [0.0, 1.0], **arguments}
    ys = ns.odeint(decay, Y0, **given)
    ys = ys[0] if isinstance(ys, tuple) else ys
    t = given["t"] if isinstance(given["t"], Tensor) else torch.tensor(given["t"])
    exact = torch.exp(-(t if t.dim() == 2 else t[:, None].expand(-1, 2)).double())[..., None].expand_as(ys)
    torch.testing.assert_close(ys, exact, rtol=0.02, atol=0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rtol": NAN}, "rtol must be a positive number or 0"),
        ({"atol": INF}, "atol must be a positive number or 0"),
        ({"atol": -1e-9}, "atol must be a positive number or 0"),
        ({"rtol": torch.tensor([1e-3, -1e-3, 1e-3])}, "rtol must be a positive number or 0"),
        ({"rtol": torch.tensor([0.0, 1e-3, 1e-3]), "atol": 0.0}, "rtol and atol may not both be 0"),
        ({"t": [0.0], **EVENT}, "event_fn and return_dense need at least two times"),
        ({"t": [0.0], "return_dense": True}, "event_fn and return_dense need at least two times"),
        ({**EVENT, "return_stats": True}, "event_fn does not go with return_stats or return_dense"),
        ({**EVENT, "return_dense": True}, "event_fn does not go with return_stats or return_dense"),
        (
            {"options": {"on_failure": "nan"}, **EVENT},
            "'on_failure': 'nan'.* does not go with return_dense or event_fn",
        ),
        ({"options": {"on_failure": "nan"}, "return_dense": True}, "does not go with return_dense or event_fn"),
        ({"options": {"on_failure": "nan", "recompute": True}}, "'on_failure': 'nan'.* does not go with options="),
        (
            {"options": {"on_failure": "nan"}, "adjoint": "continuous"},
            "'on_failure': 'nan'.* does not go with adjoint=",
        ),
        ({"return_dense": True, "adjoint": "continuous"}, "return_dense keeps every step"),
        ({"method": "rk4", "adjoint": "reversible", "steps": 1}, "adjoint='reversible' undoes steps of euler"),
        ({"options": {"jump_t": [0.5], "recompute": True}}, "option 'jump_t' does not go with options="),
        ({"options": {"perturb": True}, "adjoint": "reversible", "steps": 1}, "option 'perturb' does not go with adj"),
        ({"options": {"compile": True}}, "'compile': True"),
        ({"options": {"compile": True}, "method": "implicit_euler", "steps": 1}, "'compile': True"),
        ({"options": {"compile": True}, "method": "rk4", "steps": 1, **EVENT}, "'compile': True"),
        ({"options": {"compile": True}, "method": "rk4", "steps": 1, "return_dense": True}, "'compile': True"),
        ({"options": {"compile": True, "recompute": True}, "method": "rk4", "steps": 1}, "'compile': True"),
        ({"options": {"step_control": "per_sample", "norm": torch.max}}, "'per_sample'} is not possible: an event_fn"),
        ({"steps": 1, "options": {"grid_constructor": decay}}, "give steps, step_size or grid_constructor, not two"),
        ({"step_size": 0.1, "options": {"grid_constructor": decay}}, "give steps, step_size or grid_constructor"),
        ({"steps": 1, "options": {"step_size": 0.1}}, "give steps or step_size, not both"),
        ({"t": OWN, "y0": Y0[0]}, r"t must be \[times\], or \[times, batch\] for a state \[batch, ...\]"),
        ({"t": OWN, "y0": Y0.sum()}, r"t must be \[times\], or \[times, batch\] for a state \[batch, ...\]"),
        ({"t": OWN, "y0": Y0[:1]}, r"t must be \[times\], or \[times, batch\] for a state \[batch, ...\]"),
        ({"t": OWN, "y0": (Y0, Y0[:1])}, r"t must be \[times\], or \[times, batch\] for a state \[batch, ...\]"),
        ({"t": OWN[:0]}, r"t must hold at least one time, got shape \[0, 2\]"),
        ({"t": OWN, **EVENT}, r"t \[times, batch\] does not go with event_fn or return_dense"),
        ({"t": OWN, "return_dense": True}, r"t \[times, batch\] does not go with event_fn or return_dense"),
        ({"t": OWN.flip(0)}, "each sample's times must begin together"),
        ({"t": OWN * torch.tensor([1.0, -1.0])}, "each sample's times must be strictly increasing or decreasing"),
        ({"t": OWN * torch.tensor([1.0, 0.0])}, "each sample's times must be strictly increasing or decreasing"),
        ({"t": -OWN * torch.tensor([1.0, 0.0])}, "each sample's times must be strictly increasing or decreasing"),
        ({"t": OWN, "steps": 1}, "steps counts those between two times, which differ by sample"),
    ],
)
def test_a_call_out_of_its_limits_is_refused(arguments: dict[str, Any], message: str) -> None:
    given = {"y0": Y0.clone().requires_grad_(), "t": [0.0, 1.0], **arguments}
    with pytest.raises(ValueError, match=message):
        ns.odeint(decay, **given)


@pytest.mark.parametrize("values", [lambda y: y[0], lambda y: y[:1], lambda y: (*y, y[0]), lambda y: torch.stack(y)])
def test_noise_of_a_tuple_is_a_tuple(values: Any) -> None:
    y0 = (torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match="g must return a tuple of 2 tensors, as its state is one"):
        ns.sdeint(decay_of_each, lambda t, y: values(y), y0, [0.0, 1.0], steps=1)
    ys = ns.sdeint(decay_of_each, lambda t, y: [0 * x for x in y], y0, [0.0, 1.0], steps=1)  # type: ignore[misc]
    assert [float(y[1, 0, 0]) for y in ys] == [0.0, 0.0]


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_general_noise_has_as_many_columns_as_its_path(columns: int) -> None:
    def solved(m: int) -> Tensor:
        path = ns.BrownianPath((2, m), 0.0, 1.0, seed=0)
        g = lambda t, y: torch.ones(2, 3, columns)  # noqa: E731
        return ns.sdeint(decay, g, torch.ones(2, 3), [0.0, 1.0], noise="general", steps=1, path=path)

    assert solved(columns).shape == (2, 2, 3)
    with pytest.raises(ValueError, match=f"g returned {columns} columns, but the path is of 3"):
        solved(3)


def decay_of_each(t: Tensor, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(-x for x in y)


def test_complex_parameters_go_with_complex_states() -> None:
    rate = torch.tensor(1.0 + 1.0j, requires_grad=True)
    how: dict[str, Any] = {"method": "euler", "steps": 2, "adjoint": "continuous", "adjoint_params": (rate,)}
    ys = ns.odeint(lambda t, y: -rate * y, torch.ones(1, dtype=torch.complex64), [0.0, 1.0], **how)
    torch.testing.assert_close(ys[1].detach(), (1 - rate.detach() / 2)[None] ** 2)
    with pytest.raises(ValueError, match="takes complex parameters for complex states only"):
        ns.odeint(lambda t, y: -(rate * y).real, torch.ones(1), [0.0, 1.0], **how)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (EVENT, "event_fn and return_dense cannot be exported"),
        ({"return_dense": True}, "event_fn and return_dense cannot be exported"),
        ({}, "error control cannot be exported"),
        ({"method": "rk4", "rtol": 1e-3}, "error control cannot be exported"),
        ({"method": "rk4", "steps": 1}, None),
        ({"method": "rk4"}, None),
    ],
)
def test_what_depends_on_numbers_is_not_exported(arguments: dict[str, Any], message: str | None) -> None:
    def solved(y: Tensor) -> Tensor:
        return ns.odeint(decay, y, [0.0, 1.0], **arguments)[1]

    if message is None:
        assert torch.allclose(torch.jit.trace(solved, Y0)(Y0 + 1), solved(Y0 + 1))
    else:
        with pytest.raises(ValueError, match=message):
            torch.jit.trace(solved, Y0)


def test_steps_that_follow_from_computed_times_are_not_exported() -> None:
    class Solve(torch.nn.Module):
        def forward(self, y: Tensor, t: Tensor) -> Tensor:
            return ns.odeint(decay, y, t, method="rk4", step_size=0.5)

    with pytest.raises(ValueError, match=r"how many steps there are follows from t, .* give steps=\.\.\."):
        torch.export.export(Solve(), (Y0, torch.tensor([0.0, 1.0])))


def test_noise_is_solved_at_one_time() -> None:
    assert torch.equal(ns.sdeint(decay, decay, Y0, [0.5], steps=1), Y0[None])


def test_one_sample_may_have_times_of_its_own() -> None:
    ys = ns.odeint(decay, Y0[:1], OWN[:, :1])
    torch.testing.assert_close(ys[1], Y0[:1] / torch.e)


def test_an_adjoint_method_with_options_of_another_is_refused() -> None:
    with pytest.raises(ValueError, match="adjoint_method='rk4' cannot take the options of 'dopri5'"):
        ns.odeint_adjoint(decay, Y0, [0.0, 1.0], adjoint_method="rk4", options={"max_step": 0.5})
    for more in ({"adjoint_options": {}}, {"adjoint_method": "dopri5"}, {"adjoint_method": None}):
        ns.odeint_adjoint(decay, Y0, [0.0, 1.0], options={"max_step": 0.5}, **more)


@pytest.mark.parametrize(("reverse", "sign"), [(False, 1.0), (True, -1.0)])
@pytest.mark.parametrize("t0", [torch.tensor(2.0), torch.tensor(2)])
def test_an_event_is_looked_for_in_the_direction_of_time(t0: Tensor, reverse: bool, sign: float) -> None:
    found, ys = ns.odeint_event(
        lambda t, y: torch.ones_like(y),
        Y0,
        t0,
        event_fn=lambda t, y: y.sum() - 6 * (1 + 3 * sign),
        reverse_time=reverse,
    )
    assert float(found) == pytest.approx(2 + 3 * sign) and float(ys[1, 0, 0]) == pytest.approx(1 + 3 * sign)


def test_who_shares_steps_with_whom() -> None:
    def control(f: Any, y0: Tensor, **asked: Any) -> str:
        return ns.odeint(f, y0, [0.0, 0.1], rtol=1e-3, atol=1e-3, return_stats=True, **asked)[1].step_control

    f, y0 = ns.MLPDynamics(3), torch.ones(2, 3)
    assert control(f, y0) == "per sample"
    assert control(f, y0[:1], options={"fused": False}) == "shared"
    assert control(f, y0, options={"step_control": "shared"}) == "shared"
    assert control(f, y0, options={"norm": lambda y: y.abs().max()}) == "shared"
    assert control(decay, y0) == "shared"
    assert control(decay, y0, options={"step_control": "per_sample"}) == "per sample"
    assert control(decay, y0[:1], options={"step_control": "per_sample"}) == "per sample"
    assert control(decay, y0, steps=None) == "shared"


# ---- how a call is understood ----------------------------------------------------------------------------------------


def test_the_methods_are_what_their_tableaus_say() -> None:
    explicit = [
        "euler",
        "midpoint",
        "heun2",
        "heun3",
        "rk4",
        "adaptive_heun",
        "fehlberg2",
        "bosh3",
        "dopri5",
        "tsit5",
        "dopri8",
    ]
    assert [name for name, method in METHODS.items() if method.explicit] == explicit
    one_stage = [name for name, method in METHODS.items() if method.one_stage]
    assert one_stage == ["euler", "implicit_euler", "implicit_midpoint"]
    assert [METHODS[name].theta for name in one_stage] == [0.0, 1.0, 0.5]
    with pytest.raises(ValueError, match="rk4 has 4 stages; only methods of one stage have a theta"):
        assert METHODS["rk4"].theta
    starts = {name for name, method in METHODS.items() if method.starts_with_slope}
    assert starts == {*explicit, "trapezoid", "trbdf2", "kvaerno3"}
    ends = {name for name, method in METHODS.items() if method.ends_with_slope}
    assert ends == {"implicit_euler", "sdirk2", "trbdf2", "kvaerno3", "trapezoid", "bosh3", "dopri5", "tsit5", "dopri8"}


@pytest.mark.parametrize(
    ("steps", "size", "adjoint", "name"),
    [
        (None, None, "discrete", "dopri5"),
        (None, None, "continuous", "dopri5"),
        (None, None, "reversible", "implicit_midpoint"),
        (1, None, "discrete", "implicit_midpoint"),
        (None, 0.1, "discrete", "implicit_midpoint"),
    ],
)
def test_a_call_that_names_no_method_has_one(steps: int | None, size: float | None, adjoint: str, name: str) -> None:
    assert default_method(steps, size, adjoint) == name
    assert Request.of(None, steps, size, (None, None), adjoint, {}).method.name == name


NOTHING = (None, None)


@pytest.mark.parametrize(
    ("method", "steps", "size", "tolerances", "given", "adaptive"),
    [
        ("dopri5", None, None, NOTHING, {}, True),
        ("dopri5", 1, None, NOTHING, {}, False),
        ("dopri5", None, 0.1, NOTHING, {}, False),
        ("dopri5", None, None, NOTHING, {"grid_constructor": decay}, False),
        ("dopri5", 1, None, (1e-3, None), {"max_step": 1.0}, False),
        ("rk4", None, None, NOTHING, {}, False),
        ("rk4", None, None, (1e-3, None), {}, True),
        ("rk4", None, None, (None, 1e-3), {}, True),
        ("rk4", None, None, NOTHING, {"max_step": 1.0}, True),
        ("rk4", None, None, NOTHING, {"interp": "linear"}, False),
    ],
)
def test_who_chooses_the_steps(
    method: str, steps: int | None, size: float | None, tolerances: Any, given: dict[str, Any], adaptive: bool
) -> None:
    assert Request.of(method, steps, size, tolerances, "discrete", given).adaptive == adaptive


def test_a_reversible_call_that_names_nothing_has_tolerances_of_its_order() -> None:
    loose = backend.REVERSIBLE_TOLERANCES
    assert Request.of(None, None, None, NOTHING, "reversible", {}).tolerances == loose
    for method, tolerances, adjoint in [
        ("implicit_midpoint", NOTHING, "reversible"),
        (None, (1e-3, None), "reversible"),
        (None, NOTHING, "discrete"),
    ]:
        assert Request.of(method, None, None, tolerances, adjoint, {}).tolerances == tolerances


@pytest.mark.parametrize(
    ("times", "adjoint", "event", "grid"),
    [
        ([0.0, 0.1, 0.3], "discrete", False, False),
        ([0.3, 0.1, 0.0], "discrete", False, False),
        ([0.0, 0.1 + 1e-8, 0.3], "discrete", False, False),
        ([0.0, 0.15, 0.3], "discrete", False, True),
        ([0.0, 0.1001, 0.3], "discrete", False, True),
        ([0.0, 0.05], "discrete", False, True),
        ([0.0, 0.15, 0.3], "reversible", False, False),
        ([0.0, 0.15, 0.3], "discrete", True, False),
        ([0.0, 1e5 + 0.001], "discrete", False, False),
        ([0.0, 1.0001], "discrete", False, True),
        ([], "discrete", False, False),
    ],
)
def test_the_option_step_size_is_a_grid_unless_all_times_are_on_it(
    times: list[float], adjoint: str, event: bool, grid: bool
) -> None:
    how = Request.of("euler", None, None, NOTHING, adjoint, {"step_size": 0.1}, None, times, event)
    assert how.options == ({"grid_constructor": UniformGrid(0.1)} if grid else {"step_size": 0.1})
    assert how.step_size == (None if grid else 0.1)


def test_calls_of_numbers_and_words_are_remembered_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_requests", {})
    monkeypatch.setattr(backend, "MOST_REQUESTS", 2)

    def ask(steps: Any = 1, method: Any = "euler", tolerances: Any = NOTHING, given: Any = None, by: Any = None) -> Any:
        return Request.of(method, steps, None, tolerances, "discrete", given or {}, by)

    first = ask()
    assert ask() is first and first.steps == 1 and first.method.name == "euler"
    for other in (
        ask(method=METHODS["euler"]),
        ask(tolerances=(1e-3, None)),
        ask(given={"fused": False}),
        ask(by=()),
        ask(steps=1.0),
        ask(steps=True),
    ):
        assert other is not first
    assert len(backend._requests) == 1
    assert ask(2) is ask(2) is not first and len(backend._requests) == 2
    ask(3)
    assert len(backend._requests) == 1 and ask() is not first
