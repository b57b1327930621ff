"""Planted bugs: each breaks one rule of the engine in-process, and names the smallest check that must notice.

Every one of them has been seen in the wild or is one line away from the code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import smallest_checks as check
import torch
from torch import Tensor, nn

import certify
from certify.activations import enclose, fan, piecewise, smooth
from certify.activations.piecewise import PiecewiseLinear
from certify.convex import margin, program, semidefinite
from certify.enclosures import Interval, Relaxation
from certify.frames import Frame
from certify.graph import Call, _Builder
from certify.lipschitz import compile as compiling
from certify.lipschitz import hermitian, maps, steps
from certify.ops.arithmetic import Scale, Sum
from certify.ops.base import Affine, Elementwise, inner
from certify.ops.conv import Conv, ConvTranspose
from certify.ops.linear import Linear
from certify.ops.pool import MaxPool
from certify.ops.shape import Select
from certify.propagate import methods, optimize
from certify.propagate.backward import Neurons, Rows
from certify.propagate.state import Knowledge
from certify.sets import LpBall
from models import kaf_table, plan
from models.kaf_facts import KAFFacts
from models.kaf_table import Table
from models.kaf_tails import Tailed, TailedFacts
from models.training import certified

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Mutant:
    """``plant`` breaks the engine; ``check`` passes on the sound one and must raise on the broken one."""

    name: str
    plant: Callable[[Patch], None]
    check: Callable[[], None]


MUTANTS: list[Mutant] = []


def mutant(check: Callable[[], None]) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    """Register a planted bug together with the check that must kill it."""

    def register(plant: Callable[[Patch], None]) -> Callable[[Patch], None]:
        MUTANTS.append(Mutant(plant.__name__, plant, check))
        return plant

    return register


def _keep(function: Any, change: Callable[[Any], Any]) -> Any:
    """The function with its result changed."""
    return lambda *arguments, **options: change(function(*arguments, **options))


@mutant(check.relu_network)
def swapped_signs_in_pull_back(patch: Patch) -> None:
    def pull_back(self: Elementwise, A: Tensor, r: Relaxation | None) -> Any:
        assert r is not None
        pulled = torch.where(A >= 0, r.upper_slope, r.lower_slope) * A
        return (pulled,), inner(A.clamp(min=0), r.upper_offset) + inner(A.clamp(max=0), r.lower_offset)

    patch.setattr(Elementwise, "pull_back", pull_back)


@mutant(check.linear_rule)
def no_absolute_value_in_linear(patch: Patch) -> None:
    patch.setattr(Linear, "absolute", Linear.linear)


@mutant(check.convolution_rule)
def no_absolute_value_in_convolution(patch: Patch) -> None:
    patch.setattr(Conv, "absolute", Conv.linear)


@mutant(check.whole_balls)
def wrong_dual_exponent(patch: Patch) -> None:
    """The l2 ball with the dual norm of the l1 ball."""

    def support(self: LpBall, a: Tensor) -> Tensor:
        b = a.double().flatten(1)
        return (b * self.center.double().flatten(1)).sum(1) + self.radius * b.abs().amax(1)

    patch.setattr(LpBall, "support", support)


@mutant(check.clipped_balls)
def no_radius_in_support(patch: Patch) -> None:
    patch.setattr("certify.sets.ball.l2_dual", lambda magnitude, cap, radius: torch.zeros_like(radius))


@mutant(check.clipped_balls)
def clip_forgotten(patch: Patch) -> None:
    before = LpBall.__init__

    def init(self: LpBall, *arguments: Any, **options: Any) -> None:
        before(self, *arguments, **options)
        self.clip = None

    patch.setattr(LpBall, "__init__", init)


@mutant(check.silu_facts)
def no_sag_in_enclose(patch: Patch) -> None:
    def flat(cells: Any) -> Any:
        return replace(cells, rise=cells.rise * 0, slack=cells.slack * 0)

    patch.setattr(enclose._Cells, "between", _keep(enclose._Cells.between, flat))


@mutant(check.kaf_facts)
def no_fourth_derivative_of_a_kaf(patch: Patch) -> None:
    patch.setattr(Table, "fourth", lambda self, lower, upper: torch.zeros_like(lower))


@mutant(check.coarse_table)
def no_error_of_a_table(patch: Patch) -> None:
    before = Table._limit
    patch.setattr(
        Table, "_limit", lambda self, row, lower, upper: before(self, row, lower, upper) * (0.0 if row < 2 else 1.0)
    )


@mutant(check.coarse_table)
def turning_points_forgotten(patch: Patch) -> None:
    patch.setattr(kaf_table, "_turns", lambda low, step, cubic: (cubic[0][:, :0].t(), cubic[0][:, :0].t()))


@mutant(check.fan_between_lines)
def rounding_of_interpolated_lines_forgotten(patch: Patch) -> None:
    patch.setattr(fan, "_between", _keep(fan._between, lambda found: (*found[:2], found[2] * 0)))


@mutant(check.kinked_base)
def kink_taken_for_smooth(patch: Patch) -> None:
    """f'' of ELU at 0 from the left, for the cell on the right as well."""
    before = smooth.ELU.formula

    def formula(self: smooth.ELU) -> smooth.Formula:
        found = before(self)
        return replace(found, bound=lambda r, upper: torch.where(upper > 0, 0.0, self.alpha * torch.exp(-r)))

    patch.setattr(smooth.ELU, "formula", formula)


@mutant(check.relu_network)
def forgotten_bias(patch: Patch) -> None:
    before = Knowledge.rider
    patch.setattr(Knowledge, "rider", lambda self, name: replace(before(self, name), constant=None))


@mutant(check.residual)
def fork_overwritten(patch: Patch) -> None:
    patch.setattr(Rows, "add", lambda self, name, A: self.pending.__setitem__(name, A))


@mutant(check.wide_eps)
def wrong_eps_of_batch_norm(patch: Patch) -> None:
    before = Call.option
    patch.setattr(Call, "option", lambda self, name, *rest: 1e-5 if name == "eps" else before(self, name, *rest))


@mutant(check.relu_facts)
def offsets_swapped(patch: Patch) -> None:
    def swapped(r: Relaxation) -> Relaxation:
        return Relaxation(r.lower_slope, r.upper_offset, r.upper_slope, r.lower_offset)

    patch.setattr(piecewise, "outward", _keep(piecewise.outward, swapped))


@mutant(check.exact_chords)
def offsets_rounded_to_nearest(patch: Patch) -> None:
    def nearest(dtype: torch.dtype, lower: Any, upper: Any) -> Relaxation:
        return Relaxation(*(value.to(dtype) for value in (*lower, *upper)))

    patch.setattr(piecewise, "outward", nearest)


@mutant(check.rounding)
def no_rounding_error_of_affine_layers(patch: Patch) -> None:
    patch.setattr(Affine, "rounding_error", lambda self, *zs: None)


@mutant(check.rounding_before_lines)
def errors_not_absorbed_by_lines(patch: Patch) -> None:
    patch.setattr(Knowledge, "_cost", lambda self, node, rider, error, slope, b: torch.zeros_like(b))


@mutant(check.rounding)
def no_loss_in_rows(patch: Patch) -> None:
    patch.setattr(Rows, "lose", lambda self, name, amount: None)


@mutant(check.rounding_of_neurons)
def losses_negated_with_their_rows(patch: Patch) -> None:
    before = Rows._split

    def split(self: Rows) -> None:
        was = self.split
        before(self)
        if self.split and not was:
            self.loss = self.loss * torch.tensor([1.0, -1.0])

    patch.setattr(Rows, "_split", split)


@mutant(check.rounding_behind_relu)
def intermediate_bounds_not_widened(patch: Patch) -> None:
    def interval(self: Knowledge, node: Any) -> Interval:
        return node.rule.interval(*self.inputs(node))

    patch.setattr(Knowledge, "forward_interval", interval)


@mutant(check.batch_norm)
def centre_forgotten_in_rounding(patch: Patch) -> None:
    """gamma |s| |x - mean| instead of gamma |s| (|x| + |mean|)."""
    patch.setattr(Scale, "rounding_error", lambda self, *zs: self.interval(*zs).magnitude * 18 * 2.0**-24)


@mutant(check.max_pool_rule)
def max_pool_ends_swapped(patch: Patch) -> None:
    patch.setattr(MaxPool, "interval", lambda self, z: Interval(self.run(z.upper), self.run(z.lower)))


@mutant(check.max_pool_rule)
def max_pool_lines_swapped(patch: Patch) -> None:
    before = MaxPool.pull_back

    def pull_back(self: MaxPool, A: Tensor, r: Relaxation) -> Any:
        return before(self, A, Relaxation(r.upper_slope, r.upper_offset, r.lower_slope, r.lower_offset))

    patch.setattr(MaxPool, "pull_back", pull_back)


@mutant(check.strided_convolution)
def output_padding_dropped(patch: Patch) -> None:
    def transpose(self: Conv, A: Tensor) -> tuple[Tensor]:
        small = nn.functional.conv_transpose2d(
            A, self.weight, None, self.stride, self.padding, 0, self.groups, self.dilation
        )
        missing = [n - m for n, m in zip(self.input_shapes[0][1:], small.shape[2:], strict=True)]
        return (nn.functional.pad(small, (missing[1], 0, missing[0], 0)),)

    patch.setattr(Conv, "transpose", transpose)


@mutant(check.window_rows)
def groups_forgotten_in_windows(patch: Patch) -> None:
    before = Conv.pull_window

    def pull_window(self: Conv, A: Tensor, relaxation: Relaxation | None) -> Any:
        pulled, constant = before(self, A, relaxation)
        return (torch.stack([part.roll(1, 2) for part in pulled]) if self.groups > 1 else pulled), constant

    patch.setattr(Conv, "pull_window", pull_window)


@mutant(check.window_rows)
def windows_leak_over_the_edge(patch: Patch) -> None:
    before = Frame.cut

    def cut(self: Frame, values: Tensor, sample: Tensor, position: Tensor) -> Tensor:
        found = before(self, values, sample, position)
        return torch.ones_like(found) if values.shape[:2] == (1, 1) else found

    patch.setattr(Frame, "cut", cut)


@mutant(check.window_rows)
def windows_one_off(patch: Patch) -> None:
    before = Frame.through
    patch.setattr(
        Frame,
        "through",
        lambda self, s, p, t: (f := before(self, s, p, t)) and replace(f, shift=(f.shift[0] + 1, *f.shift[1:])),
    )


@mutant(check.padding_rule)
def fill_forgotten(patch: Patch) -> None:
    patch.setattr(Select, "forward", Select.linear)


@mutant(check.clamp_facts)
def clamp_values_by_differences(patch: Patch) -> None:
    """value + (s - limit), which no float equals, taken for exact."""
    patch.setattr(piecewise.Clamp, "_values", PiecewiseLinear._values)
    patch.setattr(PiecewiseLinear, "_exact_values", True)


@mutant(check.bands)
def constants_of_the_claim_forgotten(patch: Patch) -> None:
    before = methods.spec_rows
    patch.setattr(
        methods, "spec_rows", lambda knowledge, spec, **o: before(knowledge, certify.Spec(spec.C, spec.d * 0), **o)
    )


@mutant(check.overflow)
def overflow_taken_for_a_bound(patch: Patch) -> None:
    patch.setattr(Interval, "sanitized", lambda self: self)


@mutant(check.hidden_clamp)
def writes_unnoticed(patch: Patch) -> None:
    patch.setattr(_Builder, "_check_unwritten", lambda self, node: None)


@mutant(check.sorted_features)
def any_tuple_taken_for_pieces(patch: Patch) -> None:
    patch.setattr(_Builder, "_check_split", lambda self, node, module: self.splits.add(node))


@mutant(check.small_noise)
def randomness_unnoticed(patch: Patch) -> None:
    patch.setattr("certify.safeguards._random_states", lambda device: [])


@mutant(check.transposed_rule)
def outputs_beyond_the_input(patch: Patch) -> None:
    patch.setattr(
        ConvTranspose, "transpose", lambda self, A: (nn.functional.conv1d(A, self.weight, dilation=self.dilation),)
    )


@mutant(check.difference_rule)
def sign_of_a_difference_forgotten(patch: Patch) -> None:
    patch.setattr(Sum, "transpose", lambda self, A: (A, A))


@mutant(check.scale_rule)
def scale_forgotten(patch: Patch) -> None:
    patch.setattr(Scale, "transpose", lambda self, A: (A,))


@mutant(check.relu_facts)
def lines_through_the_ends_only(patch: Patch) -> None:
    before = PiecewiseLinear._vertices
    patch.setattr(PiecewiseLinear, "_vertices", lambda self, z: tuple(part[[0, -1]] for part in before(self, z)))


@mutant(check.relu_network)
def constants_of_negated_rows_kept(patch: Patch) -> None:
    before = Rows._split

    def split(self: Rows) -> None:
        before(self)
        self.offset = self.offset.abs()

    patch.setattr(Rows, "_split", split)


@mutant(check.ties)
def ties_taken_for_proofs(patch: Patch) -> None:
    before = methods.Propagation.bound
    patch.setattr(methods.Propagation, "bound", _keep(before, lambda lower: lower + 1e-6))


@mutant(check.optimised_rows)
def places_beyond_the_fan(patch: Patch) -> None:
    """Steps that are not projected back leave the certified lines."""
    patch.setattr(
        optimize.Places, "climb", lambda self, gradient, step, length: self.at.add_(gradient.sign(), alpha=length)
    )


@mutant(check.optimised_rows)
def lines_chosen_by_the_wrong_sign(patch: Patch) -> None:
    before = optimize.Slopes.choose
    patch.setattr(optimize.Slopes, "choose", lambda self, A: before(self, -A))


@mutant(check.optimised_rows)
def both_ends_from_the_same_sign(patch: Patch) -> None:
    before = Neurons.rows
    patch.setattr(
        Neurons, "rows", lambda self, index, sign=None: before(self, index, None if sign is None else sign.abs())
    )


@mutant(check.negative_slopes)
def product_of_slopes_forgotten(patch: Patch) -> None:
    """Without the term a b of a sector its lower end counts as 0."""
    before = compiling.Gate
    patch.setattr(
        compiling, "Gate", lambda name, c, r: before(name, (c + r) / 2, (c + r).abs() / 2 * (c + r > 0) * 0.1)
    )


@mutant(check.torus_of_a_padded_convolution)
def torus_without_room(patch: Patch) -> None:
    patch.setattr(maps, "_widen", lambda *_: None)


@mutant(check.overlapping_windows)
def overlap_forgotten(patch: Patch) -> None:
    before = compiling.Renew
    patch.setattr(compiling, "Renew", lambda name, gain, *rest: before(name, gain / gain, *rest))


@mutant(check.multipliers_without_a_proof)
def growth_forgotten(patch: Patch) -> None:
    """Without the inverse of S - M small multipliers cost nothing."""
    patch.setattr(steps, "grow_bound", lambda P, T: P.clone())


@mutant(check.step_in_sixty_digits)
def rounding_of_states_forgotten(patch: Patch) -> None:
    before = steps.settled
    for module in (steps, hermitian):
        patch.setattr(module, "settled", lambda Q, errors: before(Q, lambda w: 0 * w))
        patch.setattr(module, "FEW", 0.0)


@mutant(check.margin_of_floats)
def drift_forgotten(patch: Patch) -> None:
    before = margin.output_drift
    patch.setattr(margin, "output_drift", lambda knowledge: 0 * before(knowledge))


@mutant(check.program_with_noise)
def multipliers_without_their_price(patch: Patch) -> None:
    before = program.Program._evaluated
    patch.setattr(
        program.Program, "_evaluated", lambda self, cost, lam, mu: before(self, cost, lam, mu) + abs(lam).sum() + 0.5
    )


@mutant(check.program_with_noise)
def smallest_eigenvalue_on_trust(patch: Patch) -> None:
    """The solver's gamma, somewhat raised, without the repair."""
    before = semidefinite.propose

    def propose(*parts: Any) -> Any:
        ranges, multipliers, level = before(*parts)
        return ranges, multipliers, level + 5.0

    patch.setattr(semidefinite, "propose", propose)
    patch.setattr(semidefinite, "top", lambda P: torch.zeros(1))


@mutant(check.tailed_facts)
def tails_bend_no_more(patch: Patch) -> None:
    """The jump of f'' at the ends of the dictionary counts as none."""
    patch.setattr(Tailed, "fourth", lambda self, lower, upper: 0 * self.bends[0] + 0 * lower)


@mutant(check.tailed_facts)
def tails_fall_silently(patch: Patch) -> None:
    """Ranges end where the dictionary does."""
    patch.setattr(TailedFacts, "range", lambda self, z: self.inner.range(self._inside(z)))


@mutant(check.tailed_facts)
def slopes_of_the_wrong_end(patch: Patch) -> None:
    before = KAFFacts.ends

    def swapped(self: KAFFacts, bound: float) -> Any:
        found = before(self, bound)
        return replace(found, slopes=found.slopes[::-1])

    patch.setattr(KAFFacts, "ends", swapped)


@mutant(check.hardswish_facts)
def jumps_of_a_slope_forgotten(patch: Patch) -> None:
    patch.setattr(smooth.Hardswish, "inflections", ())
    patch.setattr(smooth.Hardswish, "slope_range", smooth.ClosedForm.slope_range)


@mutant(check.sums_by_powers)
def groups_too_wide_for_float32(patch: Patch) -> None:
    """One group for all points, whatever it costs: t^j of twenty points."""
    patch.setattr(plan, "WIDEST", 10)
    patch.setattr(plan, "_roundings", lambda *_: 0.0)


@mutant(check.worst_case_losses)
def best_case_taken_for_the_worst(patch: Patch) -> None:
    before = certified.margins_of
    patch.setattr(certified, "margins_of", lambda *given: before(*given).abs())
